"""What an advantage estimator is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from megatron_r1.config.section import Section
from megatron_r1.types import Group


class Advantage(ABC):
    """Turns the rewards of a whole rollout into advantages of its tokens.

    A subclass that needs more than rewards says so, and the loop provides it.
    """

    class Config(Section):
        """The estimator's own keys of [advantage]; a subclass with keys defines its own."""

    needs_group: ClassVar[bool] = True
    """Whether it compares the samples of a group, so that a question needs at least two."""
    needs_values: ClassVar[bool] = False
    """Whether `sample.values` must be there: the run needs a [critic]."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs_ref_logprobs(self) -> bool:
        """Whether `ref_logprobs` and every `sample.trainer_logprobs` must be there."""
        return False

    @abstractmethod
    def __call__(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> None:
        """Fill `advantages` of every sample, one number a token.

        Args:
            groups: of one rollout, scored.
            ref_logprobs: log-probabilities of every sample's tokens under the reference policy, in the order of the
                samples, where `needs_ref_logprobs`. [samples][sampled]
        """

    def returns(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> list[list[float]]:
        """What the critic should have said before each token, where `needs_values`. [samples][sampled]"""
        raise TypeError(f"{type(self).__name__} trains no critic")


def spread(group: Group, advantages: Sequence[float]) -> None:
    """Give every token of a sample the sample's advantage. `advantages`: [samples]"""
    for sample, advantage in zip(group.samples, advantages, strict=True):
        sample.advantages = [advantage] * sample.length
