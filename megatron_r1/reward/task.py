"""Task reward: what the task's own verifier says of the answer."""

from typing import Any, ClassVar, Protocol

from megatron_r1.config import component
from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.response import AnswerIn, extract_answer, response
from megatron_r1.types import Group, Question


class Verifier(Protocol):
    """The part of a task that judges answers."""

    def verify(self, question: Question, answer: str) -> float:
        """Score of `answer`, from 0 (wrong) to 1 (right)."""
        ...


class TaskVerifier(Reward):
    """1.0 for an answer that the question's task accepts, 0.0 for any other and for a missing one."""

    class Config(Section):
        answer_in: AnswerIn = "tags"
        partial_credit: bool = False
        """Keep scores between 0 and 1 that a task's verifier gives; R1's reward is right or wrong."""

    isolated: ClassVar[bool] = True
    judges_correctness: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._tasks: dict[str, Any] = {}

    def __call__(self, group: Group) -> list[float | None]:
        question = group.question
        texts = [response(question, sample) for sample in group.samples]
        return [self._score(question, extract_answer(text, self.config.answer_in)) for text in texts]

    def _score(self, question: Question, answer: str | None) -> float:
        if not answer:
            return 0.0
        score = min(1.0, max(0.0, self._verifier(question).verify(question, answer)))
        return score if self.config.partial_credit else float(score >= 1.0)

    def _verifier(self, question: Question) -> Verifier:
        """The question's task, rebuilt from what the question carries and kept."""
        section = {**question.metadata.get("config", {}), "type": question.task}
        key = repr(section)
        if key not in self._tasks:
            self._tasks[key] = component.build("task", section)
        verifier: Verifier = self._tasks[key]
        return verifier
