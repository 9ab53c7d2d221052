"""What a reward is: one number for each sample of a group."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from megatron_r1.config.section import Section
from megatron_r1.types import Group

Scores = list[float | None]
"""One for each sample; None where the reward does not apply. [samples]"""


class Reward(ABC):
    """Scores the samples of one question.

    A section of [rewards] names a subclass by `type`; `weight` belongs to the `Judge`, the other keys fill `Config`.
    """

    class Config(Section):
        """The reward's own keys of its section; a subclass with keys defines its own."""

    isolated: ClassVar[bool] = False
    """True for code that takes long, or may hang or crash on what a policy writes. It then runs in a worker process
    that is killed at the time limit, and is called with one sample at a time, so that a bad one takes no other with it;
    that sample has its text but neither tokens nor logprobs."""
    judges_correctness: ClassVar[bool] = False
    """True when a score of 1.0 or more means that the answer is right; `sample.correct` says so."""
    needs_correctness: ClassVar[bool] = False
    """True for a reward that reads `sample.correct`: it is called after those that judge it."""
    may_fail: ClassVar[bool] = False
    """True for a reward that goes on when its server gives no answer. A None beside scores of the same group then
    counts as their mean in the weighted sum, which speaks neither for nor against the sample; 0 would be a verdict."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @cached_property
    def counters(self) -> Counter[str]:
        """What went wrong, by name; the metrics show it as `<reward>_<name>`. Not of an `isolated` reward."""
        return Counter()

    @property
    def deadline(self) -> float | None:
        """Seconds that one sample may take where this reward knows better than the run's `reward_timeout`."""
        return None

    @property
    def failure_score(self) -> float:
        """Score of a sample that ran past the time limit or killed its worker; the least that any may get."""
        return 0.0

    def prepare(self) -> None:  # noqa: B027 (most rewards need nothing)
        """Start what scoring needs, in the process that scores, so that what is missing is found before a run begins.

        Raises:
            UserError: says what is missing.
        """

    @abstractmethod
    def __call__(self, group: Group) -> Scores:
        """One score a sample; None where the reward does not apply, which leaves it out of the sum. [samples]"""

    def begin(self, group: Group) -> Callable[[], Scores]:
        """Start to score; what is returned waits for the scores.

        A reward that asks a server overrides this, so that others are scored while it answers; here they are computed
        at once.
        """
        scores = self(group)
        return lambda: scores
