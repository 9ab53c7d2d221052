"""How far the trainer's and the engine's log-probabilities of the same tokens are apart.

The gradient is only as right as the assumption that the engine samples from the policy being trained; a
wrong norm, rotary table, routing or a stale cache shows here first.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_r1.errors import EngineError
from megatron_r1.model.parallel import device
from megatron_r1.train.batch import Minibatch
from megatron_r1.train.policy import Figures


def logprob_difference(minibatches: Sequence[Minibatch]) -> Figures:
    """|trainer - engine| over all response tokens of all ranks, nats: mean and maximum."""
    gaps = [
        (micro.inputs.old_logprobs - micro.engine_logprobs).abs()
        for minibatch in minibatches
        for micro in minibatch
        if micro.inputs.old_logprobs is not None and micro.engine_logprobs is not None
    ]
    largest = torch.stack([gap.max() for gap in gaps if gap.numel()] or [torch.zeros((), device=device())]).max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return {"logprob_difference_mean": mean_over_ranks(gaps), "logprob_difference_max": float(largest)}


def mean_over_ranks(values: Sequence[torch.Tensor]) -> float:
    """Mean of all elements of all ranks' tensors; a rank may have none, but not all ranks."""
    total = torch.zeros(2, dtype=torch.float64, device=device())
    for value in values:
        total[0] += value.double().sum()
        total[1] += value.numel()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def refuse_above(bound: float, figures: Figures) -> str:
    """The gate before the first update of a run, also of a resumed one. Returns what was measured, in words.

    Raises:
        EngineError: the mean difference is above `bound`.
    """
    mean, largest = figures["logprob_difference_mean"], figures["logprob_difference_max"]
    if not mean <= bound:
        raise EngineError(
            f"trainer and rollout engine disagree: the log-probabilities of the same tokens differ by {mean:.2e} nats "
            f"on average (largest {largest:.2e}), above logprob_bound = {bound:g}. "
            "Training on these samples would be off-policy from the start. Check that both load the same weights "
            "in the same dtype; in bfloat16 about 1e-2 is normal, in float32 1e-5"
        )
    return f"trainer and engine log-probabilities differ by {mean:.1e} nats on average, {largest:.1e} at most"
