"""Rollout and learner are two policies: how far they are apart on what was sampled, and weights that correct for it."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_r1.config.asynchrony import CorrectionSection
from megatron_r1.loss.importance import LARGEST_LOG_RATIO, importance_weights
from megatron_r1.loss.policy_gradient import k3
from megatron_r1.train.batch import MicroBatch, Minibatch, with_inputs
from megatron_r1.train.mismatch import logprob_difference, mean_over_ranks
from megatron_r1.train.policy import Figures


def corrected(batch: Sequence[Minibatch], section: CorrectionSection) -> tuple[list[Minibatch], Figures]:
    """The minibatches with importance weights, and what these are like over all tokens of all ranks.

    `importance_ratio` is the mean weight before bounds, of single tokens whatever the kind; `importance_changed` the
    share of tokens whose weight a bound has changed; `mismatch_kl` KL(engine || learner), k3 estimate, nats a token;
    `mismatch_kl_kept` the same over the tokens that no bound has touched, if there are any.
    """
    ratios, changes, divergences, kept = [], [], [], []
    weighted: list[Minibatch] = []
    for minibatch in batch:
        weights = []
        for micro in minibatch:
            log_ratio = _log_ratio(micro)
            weight, changed = importance_weights(log_ratio, micro.inputs.segments, section)
            finite = log_ratio.clamp(max=LARGEST_LOG_RATIO)  # one token cannot make the figures infinite
            divergence = k3(torch.zeros_like(finite), finite)
            weights.append(weight)
            ratios.append(finite.exp())
            changes.append(changed)
            divergences.append(divergence)
            kept.append(divergence[~changed])
        weighted.append(with_inputs(minibatch, importance=weights) if section.kind != "none" else minibatch)
    named = {"ratio": ratios, "changed": changes}
    figures = {f"importance_{name}": mean_over_ranks(values) for name, values in named.items()}
    figures["mismatch_kl"] = mean_over_ranks(divergences)
    if figures["importance_changed"] < 1:
        figures["mismatch_kl_kept"] = mean_over_ranks(kept)
    return weighted, figures


def agreement(batch: Sequence[Minibatch], versions: Sequence[int], version: int) -> Figures:
    """`logprob_difference` over the responses of the learner's own weights, which both programs should agree about.

    Args:
        batch: this rank's part of a rollout, with `old_logprobs`.
        versions: of the oldest weights that each sample comes from. [samples]
        version: of the learner's weights.

    Returns:
        Nothing where all samples are of older weights.
    """
    fresh = {number for number, other in enumerate(versions) if other >= version}
    if not fresh:
        return {}
    if len(fresh) == len(versions):
        return logprob_difference(batch)
    return logprob_difference([[_only(micro, fresh) for micro in minibatch] for minibatch in batch])


def _log_ratio(micro: MicroBatch) -> torch.Tensor:
    assert micro.inputs.old_logprobs is not None
    assert micro.engine_logprobs is not None
    return micro.inputs.old_logprobs - micro.engine_logprobs


def _only(micro: MicroBatch, samples: set[int]) -> MicroBatch:
    """What a microbatch says of some samples; for `logprob_difference` alone."""
    assert micro.inputs.old_logprobs is not None
    assert micro.engine_logprobs is not None
    wanted = torch.tensor(
        [number in samples for number in micro.samples], dtype=torch.bool, device=micro.selected.device
    )
    chosen = wanted[micro.inputs.segments]
    inputs = replace(micro.inputs, old_logprobs=micro.inputs.old_logprobs[chosen])
    return replace(micro, inputs=inputs, engine_logprobs=micro.engine_logprobs[chosen])
