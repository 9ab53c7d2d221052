"""Advantages from rewards of single reasoning steps: DeepSeekMath (arXiv 2402.03300) 4.1.3, process supervision."""

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from megatron_r1.advantage.base import Advantage
from megatron_r1.types import Group, Sample


class Process(Advantage):
    """A_{i,t} = sum over the steps j of sample i that end at or after token t of r~_i^j.

    r~ = (r - mean(R)) / std(R), where R holds the rewards of all steps of all samples of the question; the standard
    deviation is the population's, as in `group_relative`. A token answers for the steps that it is part of or comes
    before; tokens after the end of the last step get 0, as an empty sum.

    A reward of the run that is not `isolated` marks the steps (`sample.step_marks`; built in: `equations`);
    `sample.reward` is not looked at. A question
    without steps, or whose steps are all equally good, gets zeros.
    """

    def __call__(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> None:
        """Fill `advantages` of every sample from its `step_rewards`."""
        for group in groups:
            rewards = [reward for sample in group.samples for _, reward in sample.step_rewards]
            mean = statistics.fmean(rewards) if rewards else 0.0
            scale = statistics.pstdev(rewards) if len(set(rewards)) > 1 else 0.0
            for sample in group.samples:
                _fill(sample, [(reward - mean) / scale if scale else 0.0 for _, reward in sample.step_rewards])


def _fill(sample: Sample, normalised: Sequence[float]) -> None:
    ends = [end for end, _ in sample.step_rewards]
    sums = [*accumulate(reversed(normalised), initial=0.0)][::-1]  # of the steps from number j on; 0 of none
    sample.advantages = [sums[bisect_left(ends, token)] for token in range(sample.length)]
