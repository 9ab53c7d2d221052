"""What a task is: a source of problems by number, which may also verify an answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_r1.config.section import Component, Section
from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

PATIENCE = 1000
"""Rejected problems in a row after which a task counts as exhausted."""


@dataclass(frozen=True)
class Problem:
    """One problem before a template turns it into a `Question`."""

    text: str
    answer: str
    """Reference answer; empty where there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON-able; what verifiers and rewards need. `Question.metadata` carries it under the same keys."""
    task: Component | None = None
    """Section of the task that made it, where that is not the run's own (a member of a mixture)."""
    template: str | None = None
    """Prompt template, where it is not the run's."""
    rewards: tuple[str, ...] | None = None
    """Names in [rewards] that score it; None = all."""


class Task(ABC):
    """A source of problems.

    Questions carry the `Config` they were made with, so that a verifier in another process rebuilds the
    task from the question alone: construction has to be cheap, data are read when the first problem is asked for.
    """

    class Config(Section):
        """The task's own keys of its section; a subclass with keys defines its own."""

    template: ClassVar[str] = "r1_zero"
    """Prompt template of a section that names none."""
    default_rewards: ClassVar[dict[str, Component]] = {}
    """What a run over this task is scored by unless it says otherwise, in the form of the run file's [rewards]."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def name(self) -> str:
        """What kind of problems these are, for ids and reports."""

    @property
    def size(self) -> int | None:
        """How many problems there are; None = as many as are asked for."""
        return None

    @abstractmethod
    def problem(self, seed: int, index: int) -> Problem:
        """Problem number `index` of stream `seed`; the same arguments give the same problem in any process.

        A task with a `size` gives each problem once before any a second time, in an order that `seed` shuffles.
        """

    def stream(self, seed: int, exclude: frozenset[str]) -> Callable[[int], Problem]:
        """Problems by position in stream `seed`, without those whose text is in `exclude`.

        Each is the same whatever was drawn before, so there is nothing to save or restore. Here an excluded problem is
        replaced by the one at its place in another stream.

        Raises:
            ConfigError: the task yields nothing but excluded problems; the stream raises it as well.
        """

        def problem(index: int) -> Problem:
            source = seed
            for attempt in range(PATIENCE):
                found = self.problem(source, index)
                if found.text not in exclude:
                    return found
                source = stream_seed("substitute", seed, attempt)
            raise dry(self, len(exclude))

        return problem

    def reward_names(self) -> frozenset[str]:
        """All names in [rewards] that its problems carry as `Problem.rewards`."""
        return frozenset()

    def verify(self, question: Question, answer: str) -> float:
        """Score of `answer`, from 0 (wrong) to 1 (right).

        Raises:
            ConfigError: the task has no verifier of its own.
        """
        raise ConfigError(
            f"task {question.task!r} cannot verify answers by itself: score it by another reward than type = 'task'"
        )


def dry(task: Task, taken: int) -> ConfigError:
    """A task has no problem left that may be drawn."""
    return ConfigError(
        f"task {task.name!r} ran dry: all its questions, or its last {PATIENCE}, were held out or seen before "
        f"({taken:,} texts are taken); ask for fewer questions or widen the task's options"
    )
