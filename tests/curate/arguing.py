"""An engine whose responses carry a grade, a judge that reads it, and a run that is killed while it judges."""

import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from megatron_r1.config.evaluation import SamplingSection
from megatron_r1.config.load import load
from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.curate.preferences import run
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Sample
from tests.reward.scripted_endpoint import Answer

VERDICTS = {2: "A>>B", 1: "A>B", 0: "A>B", -1: "B>A", -2: "B>>A"}
"""By the difference of the grades; of equals this judge prefers the first, which is its bias."""
BLOCK = re.compile(r"<response.*?>\n(.*?)\n</response", re.DOTALL)


def speak(dice: random.Random) -> tuple[str, bool]:
    """A response with a grade from 0 to 4, the longer the better, and whether it ended by itself."""
    kind = dice.choice(["good", "good", "good", "good", "endless", "truncated"])
    if kind == "endless":
        return "<think>SECRET and so on", True
    grade = dice.randrange(5)
    return f"<think>SECRET</think> Grade {grade}{' so' * (grade + dice.randrange(4))}.", kind == "good"


def grade(text: str) -> int:
    """0 where there is none."""
    return int(([0, *re.findall(r"Grade (\d)", text)])[-1])


def shown(body: dict[str, Any]) -> list[str]:
    """The responses that the judge is shown."""
    return BLOCK.findall(body["messages"][-1]["content"])


def compare(body: dict[str, Any]) -> Answer:
    first, second = map(grade, shown(body))
    verdict = VERDICTS[max(-2, min(2, first - second))]
    return {"own_answer": "none", "analysis": f"{first} and {second}", "verdict": verdict}


class Guard:
    """Calls grades above 2 safe, below 2 unsafe, and of grade 2 every other one."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, body: dict[str, Any]) -> Answer:
        text = body["messages"][-1]["content"]
        self.asked[text] += 1
        safe = grade(shown(body)[0]) > 2 or (grade(shown(body)[0]) == 2 and self.asked[text] % 2 == 0)
        return {"analysis": "so", "verdict": "safe" if safe else "unsafe"}


class Speaker:
    """An engine without a model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def stream(
        self, prompts: Sequence[list[int]], *, n: int, seed: int, **sampling: Any
    ) -> Iterator[tuple[int, list[Sample]]]:
        for index in range(len(prompts)):
            yield index, [self._answer(stream_seed(seed, index, sample)) for sample in range(n)]

    def sample(self, *arguments: Any, **options: Any) -> list[list[Sample]]:
        return [samples for _, samples in self.stream(*arguments, **options)]

    def update_weights(self, path: Path, version: int) -> None: ...

    def close(self) -> None: ...

    def _answer(self, seed: int) -> Sample:
        text, finished = speak(random.Random(seed))
        tokens = self.tokenizer.encode(text)
        return Sample(tokens, [0.0] * len(tokens), text, finished, weight_version=0)


def open_speaker(config: SamplingSection, output: Path, tokenizer: Tokenizer) -> AbstractContextManager[Speaker]:
    return nullcontext(Speaker(tokenizer))


if __name__ == "__main__":
    run(load(Path(sys.argv[1]), [], PreferencesConfig), open_speaker)
