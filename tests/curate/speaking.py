"""Engines that answer sums by a script, one script a model folder; and a run that is killed on the way."""

import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.config.collect import CollectConfig
from megatron_r1.config.evaluation import SamplingSection
from megatron_r1.config.load import load
from megatron_r1.curate.collect import run
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Sample

Script = Callable[[str, random.Random], tuple[str, bool]]
"""Prompt and dice -> response, and whether it ended by itself."""

THOUGHT = "I take the first number and count on from there until I have added all of the second one."
FAULTS = {
    "mixed_language": f"{THOUGHT} 然后我们把两个数字加在一起，这样就得到了最后的答案，这是一个很简单的问题。",
    "code_blocks": f"{THOUGHT}\n```python\nprint(1)\n```\n",
    "long_paragraphs": " ".join(f"Now {number} follows." for number in range(40)),
    "repetition": " ".join(["again and again we add one more to the sum that we have"] * 4),
}
"""Filter -> reasoning that it drops; each passes all others."""


def total(prompt: str) -> int:
    """Of the last sum or difference."""
    first, sign, second = re.findall(r"(\d+) ([+-]) (\d+)", prompt)[-1]
    return int(first) + int(second) * (1 if sign == "+" else -1)


def zero(prompt: str, dice: random.Random) -> tuple[str, bool]:
    """R1-Zero: right and readable in a third of the cases, else with one fault."""
    kind = dice.choice(["good", "good", "good", "wrong", "truncated", *FAULTS])
    answer = total(prompt) + (kind == "wrong")
    reasoning = FAULTS.get(kind, f"{THOUGHT} My dice say {dice.randrange(5)}.")
    return f" <think>{reasoning}</think> <answer>{answer}</answer>", kind != "truncated"


def writer(prompt: str, dice: random.Random) -> tuple[str, bool]:
    """Rewrites: wrong now and then, unreadable now and then, without a summary now and then."""
    kind = dice.choice(["good", "good", "wrong", "code", "bare"])
    answer = total(prompt) + (kind == "wrong")
    thought = FAULTS["code_blocks"] if kind == "code" else "I count on from the first number."
    return ("" if kind == "bare" else f"<think>{thought}</think>The sum is \\boxed{{{answer}}}."), True


def chatter(prompt: str, dice: random.Random) -> tuple[str, bool]:
    return f"They say: {prompt.splitlines()[-1]}", True


SCRIPTS: dict[str, Script] = {"zero": zero, "writer": writer, "chatter": chatter}


class Speaker:
    """Answers by a script; groups are complete in a random order."""

    def __init__(self, model: str, opener: "Opener", tokenizer: Tokenizer) -> None:
        self.model, self.opener, self.tokenizer = model, opener, tokenizer

    def stream(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        seed: int,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        opener = self.opener
        opener.drawn.append((self.model, temperature, top_p, max_tokens))
        opener.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        order = list(range(len(prompts)))
        random.shuffle(order)
        for place, index in enumerate(order):
            if place and len(opener.drawn) - 1 == opener.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield index, [self._answer(prompts[index], stream_seed(seed, index, i)) for i in range(n)]

    def sample(self, *arguments: Any, **options: Any) -> list[list[Sample]]:
        return [samples for _, samples in sorted(self.stream(*arguments, **options))]

    def update_weights(self, path: Path, version: int) -> None: ...

    def close(self) -> None: ...

    def _answer(self, prompt: list[int], seed: int) -> Sample:
        text, finished = SCRIPTS[self.model](self.tokenizer.decode(prompt), random.Random(seed))
        tokens = self.tokenizer.encode(text)
        return Sample(tokens, [0.0] * len(tokens), text, finished, weight_version=0)


class Opener:
    """Opens speakers by the name of the model's folder, and remembers what happened."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at = killed_at
        """Number of the batch that the process does not survive."""
        self.opened: list[str] = []
        self.running: list[str] = []
        self.drawn: list[tuple[str, float | None, float | None, int | None]] = []
        """Model, temperature, top-p and longest response of each batch."""
        self.prompts: list[str] = []

    def __call__(self, config: SamplingSection, output: Path, tokenizer: Tokenizer) -> AbstractContextManager[Speaker]:
        return self._open(config.model.path.name, tokenizer)

    @contextmanager
    def _open(self, model: str, tokenizer: Tokenizer) -> Iterator[Speaker]:
        assert not self.running, "the engines of two models at once"
        self.opened.append(model)
        self.running.append(model)
        yield Speaker(model, self, tokenizer)
        self.running.remove(model)


if __name__ == "__main__":
    run(load(Path(sys.argv[1]), [], CollectConfig), Opener(killed_at=int(sys.argv[2])))
