"""What an advantage estimator is."""

from typing import Protocol

from megatron_r1.types import Group


class Advantage(Protocol):
    """Turns the rewards of groups into advantages, before the rollout is cut into minibatches."""

    def __call__(self, groups: list[Group]) -> None:
        """Fill `advantage` of every sample."""
        ...
