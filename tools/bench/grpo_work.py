"""What both sides of `grpo_vs_trl.py` share: the size of the work, its questions, the reward, and taking turns.

`Prompts` and `LetterShare` are components of a run file of `megatron-r1 rl`; TRL's trainer reads the same file of
prompts and calls the same `letter_share`.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.section import Section
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.reward.base import Reward, Scores
from megatron_r1.types import Group


@dataclass(frozen=True)
class Work:
    """What one step of either side does, and with what."""

    model: str
    """Hugging Face folder."""
    prompts: str
    """JSON lines with `text` (whole, as the tokenizer reads it) and `bare` (without its first token)."""
    questions: int
    """Prompts of one step."""
    group: int
    """G, answers to each."""
    updates: int
    """Optimizer updates of one step."""
    prompt_tokens: int
    """Of the longest prompt."""
    answer_tokens: int
    """Limit of an answer."""
    steps: int
    threads: int
    lr: float = 1e-6
    dtype: str = "bfloat16"

    @property
    def samples(self) -> int:
        """Of one step."""
        return self.questions * self.group


class Turn:
    """The child's end: waits before each step until it is told to go on, and says what the step before was like.

    Args:
        address: Unix socket on which the parent listens.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._file: Any = None

    def wait(self, figures: Mapping[str, float] | None = None) -> None:
        """Blocks until it is this program's turn.

        Raises:
            SystemExit: the parent has heard enough, or is gone.
        """
        if self._file is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self._address)
            self._file = connection.makefile("rw", encoding="utf-8")
        self._file.write(json.dumps(figures or {}) + "\n")
        self._file.flush()
        if not self._file.readline():
            raise SystemExit(0)


def prompts(file: Path) -> list[dict[str, str]]:
    """Rows of a file of prompts."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def letter_share(text: str) -> float:
    """Share of the characters that are an e: a rule that any text has a score by, so that groups have advantages."""
    return text.count("e") / max(len(text), 1)


class Prompts(Task):
    """The prompts of the file in order; before those of a step are drawn, it waits for its turn."""

    class Config(Section):
        file: Path
        per_step: int
        address: str

    template = "{question}"
    name = "prompts"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._turn = Turn(config.address)
        self._rows: list[dict[str, str]] = []

    def problem(self, seed: int, index: int) -> Problem:
        if index % self.config.per_step == 0:
            self._turn.wait()
        self._rows = self._rows or prompts(self.config.file)
        return Problem(self._rows[index % len(self._rows)]["bare"], "")


class LetterShare(Reward):
    """`letter_share` of each answer."""

    def __call__(self, group: Group) -> Scores:
        return [letter_share(sample.text) for sample in group.samples]
