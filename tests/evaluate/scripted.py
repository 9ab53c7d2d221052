"""An engine that answers sums by a script, a reward that knows the answer, and a run that is killed on the way."""

import os
import random
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from megatron_r1.config.evaluation import FilterConfig, SamplingSection
from megatron_r1.config.load import load
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.evaluate.filter import run
from megatron_r1.reward.base import Reward
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Group, Sample


class Known(Reward):
    """Right if the response ends in the reference answer; no verdict where that is `?`."""

    judges_correctness: ClassVar[bool] = True

    def __call__(self, group: Group) -> list[float | None]:
        answer = group.question.answer
        ends = [sample.text.endswith(f"<answer>{answer}</answer>") for sample in group.samples]
        return [None if answer == "?" else float(end) for end in ends]


class Even(Reward):
    """Right if the response has an even number of letters."""

    judges_correctness: ClassVar[bool] = True

    def __call__(self, group: Group) -> list[float | None]:
        return [float(len(sample.text) % 2 == 0) for sample in group.samples]


class Scripted:
    """Solves `a + b` with probability a / 10, and is one off otherwise; groups are complete in a random order."""

    def __init__(self, tokenizer: Tokenizer, killed_at: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.killed_at = killed_at
        self.asked: list[int] = []
        """Prompts of each batch."""
        self.sampling: list[tuple[float | None, float | None]] = []
        """Temperature and top-p of each batch."""

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
        self.sampling.append((temperature, top_p))
        order = list(range(len(prompts)))
        random.shuffle(order)
        for place, index in enumerate(order):
            if place and len(self.asked) == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield index, [self._answer(prompts[index], stream_seed(seed, index, i)) for i in range(n)]
        self.asked.append(len(prompts))

    def sample(self, *arguments: Any, **options: Any) -> list[list[Sample]]:
        return [samples for _, samples in sorted(self.stream(*arguments, **options))]

    def update_weights(self, path: Path, version: int) -> None: ...

    def close(self) -> None: ...

    def _answer(self, prompt: list[int], seed: int) -> Sample:
        found = re.findall(r"(\d+) [+-] (\d+)", self.tokenizer.decode(prompt))
        first, second = map(int, found[-1])
        rng = random.Random(seed)
        right = rng.random() < first / 10
        text = f"<think>{'so ' * rng.randrange(9)}</think><answer>{first + second + (not right)}</answer>"
        tokens = self.tokenizer.encode(text)
        return Sample(tokens, [0.0] * len(tokens), text, finished=rng.random() < 0.9, weight_version=0)


class Opener:
    """Opens scripted engines, and remembers them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at = killed_at
        self.engines: list[Scripted] = []

    def __call__(self, config: SamplingSection, output: Path, tokenizer: Tokenizer) -> AbstractContextManager[Scripted]:
        self.engines.append(Scripted(tokenizer, self.killed_at))
        return nullcontext(self.engines[-1])

    @property
    def asked(self) -> list[int]:
        """Prompts of each batch that an engine has answered."""
        return [batch for engine in self.engines for batch in engine.asked]


if __name__ == "__main__":
    run(load(Path(sys.argv[1]), [], FilterConfig), Opener(killed_at=int(sys.argv[2])))
