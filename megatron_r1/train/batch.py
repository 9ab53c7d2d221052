"""Samples and corpus rows -> the microbatches that one rank feeds its model."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_r1.data.packing import deal, packs_needed, partition
from megatron_r1.loss.base import Loss, LossInputs
from megatron_r1.types import Group


@dataclass(frozen=True)
class Trajectory:
    """A prompt and its response, ready to train on."""

    tokens: list[int]
    """Prompt, then response. [prompt + response]"""
    response_length: int
    advantage: float
    engine_logprobs: list[float]
    """[response]"""

    @property
    def length(self) -> int:
        """Tokens that the model is fed: all but the last, which is only predicted."""
        return len(self.tokens) - 1


@dataclass
class MicroBatch:
    """The input of one forward pass."""

    tokens: torch.Tensor
    """[rows, seq]; one row when packed."""
    labels: torch.Tensor
    """The token after each. [rows, seq]"""
    ends: torch.Tensor | None
    """Where each packed sequence ends, 0 first; None = every row is one sequence. [sequences + 1]"""
    selected: torch.Tensor
    """Flat indices of the positions whose prediction counts. [selected]"""
    inputs: LossInputs
    """Per-token data of the selected positions."""
    engine_logprobs: torch.Tensor | None = None
    """[selected]"""


Minibatch = list[MicroBatch]
"""What one rank contributes to one optimizer update."""


def trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    """One trajectory for each sample, in order."""
    return [
        Trajectory(
            tokens=group.prompt_tokens + sample.tokens,
            response_length=len(sample.tokens),
            advantage=sample.advantage,
            engine_logprobs=sample.logprobs,
        )
        for group in groups
        for sample in group.samples
    ]


@dataclass(frozen=True)
class Share:
    """Which part of every minibatch is this rank's."""

    rank: int
    ranks: int
    capacity: int
    """Tokens of one microbatch."""
    device: torch.device


def split(samples: Sequence[Trajectory], minibatches: int, seed: int, loss: Loss, share: Share) -> Iterator[Minibatch]:
    """Cut a rollout at random into minibatches (DeepSeek-R1 v2, B.2) and yield this rank's part of each.

    Advantages must be there already: after the cut a minibatch need not hold whole groups. All ranks call
    this with the same arguments but `share.rank`; each gets the same number of microbatches.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    size = len(order) // minibatches
    for start in range(0, size * minibatches, size):
        chosen = [samples[index] for index in order[start : start + size]]
        weights = loss.token_weights([sample.response_length for sample in chosen])
        hands = deal([sample.length for sample in chosen], share.ranks)
        packs = max(packs_needed([chosen[i].length for i in hand], share.capacity) for hand in hands)
        mine = hands[share.rank]
        for_rank = partition([chosen[i].length for i in mine], packs)
        yield [_pack([(chosen[mine[i]], weights[mine[i]]) for i in pack], share.device) for pack in for_rank]


def _pack(samples: list[tuple[Trajectory, float]], device: torch.device) -> MicroBatch:
    """Lay sequences one behind the other; an empty pack is three tokens that nothing is asked of."""
    if not samples:  # Three, because the MTP loss divides by the tokens that have two after them.
        samples = [(Trajectory(tokens=[0, 0, 0, 0], response_length=0, advantage=0.0, engine_logprobs=[]), 0.0)]
    lengths = [sample.length for sample, _ in samples]
    ends = torch.tensor(lengths).cumsum(0)
    spans = zip(ends.tolist(), samples, strict=True)
    selected = [torch.arange(end - sample.response_length, end) for end, (sample, _) in spans]
    counts = torch.tensor([sample.response_length for sample, _ in samples])

    def spread(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts).to(device)

    return MicroBatch(
        tokens=torch.tensor([[t for sample, _ in samples for t in sample.tokens[:-1]]], device=device),
        labels=torch.tensor([[t for sample, _ in samples for t in sample.tokens[1:]]], device=device),
        ends=torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(device=device, dtype=torch.int32),
        selected=torch.cat(selected).to(device),
        inputs=LossInputs(
            weights=spread([weight for _, weight in samples]),
            segments=torch.arange(len(samples)).repeat_interleave(counts).to(device),
            advantages=spread([sample.advantage for sample, _ in samples]),
        ),
        engine_logprobs=torch.tensor([lp for sample, _ in samples for lp in sample.engine_logprobs], device=device),
    )


def from_rows(tokens: torch.Tensor, labels: torch.Tensor, batch_tokens: int) -> MicroBatch:
    """A microbatch of pretraining rows, in which every label counts.

    Args:
        tokens: [rows, seq].
        labels: [rows, seq].
        batch_tokens: tokens of the global batch, so that each weighs 1 / batch_tokens.
    """
    selected = torch.arange(tokens.numel(), device=tokens.device)
    weights = torch.full((selected.numel(),), 1 / batch_tokens, device=tokens.device)
    segments = selected // tokens.size(1)
    return MicroBatch(tokens, labels, None, selected, LossInputs(weights, segments))


def with_logprobs(minibatch: Minibatch, old: list[torch.Tensor], ref: list[torch.Tensor] | None) -> Minibatch:
    """The same minibatch with the log-probabilities that the objective compares with."""
    refs = ref or [None] * len(old)
    return [
        replace(micro, inputs=replace(micro.inputs, old_logprobs=a, ref_logprobs=b))
        for micro, a, b in zip(minibatch, old, refs, strict=True)
    ]
