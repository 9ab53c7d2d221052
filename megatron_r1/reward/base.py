"""What a reward is: one number for each sample of a group."""

from typing import Any, ClassVar, Protocol

from megatron_r1.config.section import Section
from megatron_r1.types import Group


class Reward(Protocol):
    """Scores the samples of one question.

    A section of [rewards] names it by `type`; `weight` belongs to the `Judge`, the other keys fill `Config`.
    """

    Config: ClassVar[type[Section]]
    isolated: ClassVar[bool]
    """True for code that may hang or crash on what a policy writes. It then runs in a worker process that is
    killed at the time limit, and is called with one sample at a time, so that a bad one takes no other with it;
    that sample has its text but neither tokens nor logprobs."""

    def __init__(self, config: Any) -> None: ...

    def __call__(self, group: Group) -> list[float | None]:
        """One score a sample; None where the reward does not apply, which leaves it out of the sum. [samples]"""
        ...
