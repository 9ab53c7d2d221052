"""Group-relative advantages: DeepSeekMath (arXiv 2402.03300) 4.1.2, DeepSeek-R1 (arXiv 2501.12948) eq. 3."""

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import NonNegativeFloat

from megatron_r1.advantage.base import Advantage, spread
from megatron_r1.config.section import Section
from megatron_r1.types import Group


class GroupRelative(Advantage):
    """A_i = (r_i - mean(r)) / (std(r) + eps), over the samples of one question.

    R1 states neither which standard deviation it takes nor an epsilon. Here it is the population's
    (divide by G) without epsilon: the advantages of a group then have mean square exactly 1 whatever G is.
    `std = "sample"` with `eps = 1e-4` is what TRL and open-r1 do; `std = "none"` is Dr. GRPO
    (arXiv 2503.20783). Every token of a sample gets the sample's. A group whose rewards are all equal teaches nothing
    and gets zeros.
    """

    class Config(Section):
        """Keys of an `[advantage]` section of this type."""

        std: Literal["population", "sample", "none"] = "population"
        eps: NonNegativeFloat = 0.0

    def __call__(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> None:
        """Fill `advantages` of every sample from its `reward`."""
        for group in groups:
            rewards = [sample.reward for sample in group.samples]
            mean = statistics.fmean(rewards)
            scale = self._scale(rewards)
            spread(group, [(reward - mean) / scale if scale else 0.0 for reward in rewards])

    def _scale(self, rewards: list[float]) -> float:
        if len(set(rewards)) == 1:
            return 0.0
        if self.config.std == "none":
            return 1.0
        spread = statistics.pstdev(rewards) if self.config.std == "population" else statistics.stdev(rewards)
        return spread + self.config.eps
