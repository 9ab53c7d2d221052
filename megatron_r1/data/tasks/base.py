"""What a task is: an endless source of problems that can also verify an answer."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from megatron_r1.config.section import Component, Section
from megatron_r1.types import Question


@dataclass(frozen=True)
class Problem:
    """One problem before a template turns it into a `Question`."""

    text: str
    answer: str
    """Reference answer."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON-able; what `Task.verify` needs. `Question.metadata` carries it under the same keys."""


class Task(Protocol):
    """A source of problems.

    Questions carry the `Config` they were made with, so that a verifier in another process rebuilds the
    task from the question alone: construction has to be cheap.
    """

    Config: ClassVar[type[Section]]
    default_rewards: ClassVar[dict[str, Component]]
    """What a run over this task is usually scored by, in the form of the run file's [rewards]."""

    def __init__(self, config: Any) -> None: ...

    @property
    def name(self) -> str:
        """What kind of problems these are; `data/worked.py` looks up worked solutions by it."""
        ...

    def problem(self, seed: int, index: int) -> Problem:
        """Problem number `index` of stream `seed`; the same arguments give the same problem in any process."""
        ...

    def verify(self, question: Question, answer: str) -> float:
        """Score of `answer`, from 0 (wrong) to 1 (right)."""
        ...
