"""Leave-one-out advantages: RLOO, "Back to Basics" (arXiv 2402.14740), section 3.2."""

from collections.abc import Sequence

from megatron_r1.advantage.base import Advantage, spread
from megatron_r1.types import Group


class LeaveOneOut(Advantage):
    """A_i = r_i - 1/(k - 1) sum_{j != i} r_j, over the k samples of one question.

    The baseline of a sample is the mean of the others, so it does not depend on the sample itself and the gradient is
    unbiased. It equals k / (k - 1) (r_i - mean(r)): Dr. GRPO's advantage but for a factor. Every token of a sample
    gets the sample's. The paper takes the unclipped policy gradient of whole responses, and a KL penalty within the
    reward; here both are the loss's to say.
    """

    def __call__(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> None:
        """Fill `advantages` of every sample from its `reward`."""
        for group in groups:
            rewards = [sample.reward for sample in group.samples]
            total, others = sum(rewards), len(rewards) - 1
            same = len(set(rewards)) == 1  # exactly nothing then, whatever the sum rounds to
            spread(group, [0.0 if same else reward - (total - reward) / others for reward in rewards])
