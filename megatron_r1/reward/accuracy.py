"""Accuracy reward: is the final answer right?"""

import re
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol

import math_verify

from megatron_r1.config import component
from megatron_r1.config.section import Section
from megatron_r1.reward.response import extract_answer
from megatron_r1.types import Group, Question

_WORD = re.compile("[A-Za-z]{2}")


class Verifier(Protocol):
    """The part of a task that judges answers."""

    def verify(self, question: Question, answer: str) -> float:
        """Score of `answer`, from 0 (wrong) to 1 (right)."""
        ...


class Accuracy:
    """1.0 for a right answer, 0.0 for a wrong or missing one (DeepSeek-R1, arXiv 2501.12948, section 2.2).

    The answer is the last `<answer>` block after a closed think block. The verifier is the task's own, or
    math-verify, which compares LaTeX and plain expressions by value; there a reference answer that cannot be
    parsed gives None.
    """

    class Config(Section):
        verifier: Literal["task", "math_verify"] = "task"
        partial_credit: bool = False
        """Keep scores between 0 and 1 that a task's verifier gives; R1's reward is right or wrong."""

    isolated: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._tasks: dict[str, Verifier] = {}

    def __call__(self, group: Group) -> list[float | None]:
        return [self._score(group.question, extract_answer(sample.text)) for sample in group.samples]

    def _score(self, question: Question, answer: str | None) -> float | None:
        if self.config.verifier == "math_verify":
            return math_score(question.answer, answer)
        if not answer:
            return 0.0
        score = self._verifier(question).verify(question, answer)
        return score if self.config.partial_credit else float(score >= 1.0)

    def _verifier(self, question: Question) -> Verifier:
        """The question's task, rebuilt from what the question carries and kept."""
        section = {**question.metadata.get("config", {}), "type": question.task}
        key = repr(section)
        if key not in self._tasks:
            self._tasks[key] = component.build("task", section)
        return self._tasks[key]


def math_score(reference: str, answer: str | None) -> float | None:
    """1.0 when both are the same mathematical object, 0.0 when not, None when `reference` cannot be parsed."""
    expected = _parse(reference)
    if not expected:
        return None
    if not answer:
        return 0.0
    return float(math_verify.verify(list(expected), list(_parse(answer)), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[Any, ...]:
    # Without a time limit: math-verify's own is an alarm signal; the judge's worker is killed instead.
    found = math_verify.parse(text, parsing_timeout=None)
    if not found and ("\\" in text or not _WORD.search(text)):
        # Bare LaTeX is only seen between dollar signs; prose there would be read as a product of letters.
        found = math_verify.parse(f"${text}$", parsing_timeout=None)
    return tuple(found)
