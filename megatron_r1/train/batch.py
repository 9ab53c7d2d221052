"""Samples and corpus rows -> the microbatches that one rank feeds its model."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

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
    engine_logprobs: list[float] = field(default_factory=list)
    """[response], or empty where no engine sampled it."""

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
    samples: list[int] = field(default_factory=list)
    """Numbers of the packed sequences in what was cut. [sequences]"""


Minibatch = list[MicroBatch]
"""What one rank contributes to one optimizer update."""


def trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    """One trajectory for each sample, in order."""
    return [
        Trajectory(
            tokens=group.prompt_tokens + sample.tokens,
            response_length=len(sample.tokens),
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

    The cut looks at lengths alone, and a minibatch need not hold whole groups: advantages are estimated over the whole
    rollout and attached afterwards. All ranks call this with the same arguments but `share.rank`; each gets the same
    number of microbatches.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    size = len(order) // minibatches
    for start in range(0, size * minibatches, size):
        chosen = order[start : start + size]
        lengths = [samples[index].length for index in chosen]
        weights = loss.token_weights([samples[index].response_length for index in chosen])
        hands = deal(lengths, share.ranks)
        packs = max(packs_needed([lengths[i] for i in hand], share.capacity) for hand in hands)
        mine = hands[share.rank]
        for_rank = partition([lengths[i] for i in mine], packs)
        yield [_pack(samples, {chosen[mine[i]]: weights[mine[i]] for i in pack}, share.device) for pack in for_rank]


_IDLE = Trajectory(tokens=[0, 0, 0, 0], response_length=0)
"""Three tokens that nothing is asked of; three, because the MTP loss divides by those that have two after them."""


def _pack(samples: Sequence[Trajectory], weights: dict[int, float], device: torch.device) -> MicroBatch:
    """Lay sequences one behind the other. `weights`: sample's number -> weight of its tokens; none = an idle pass."""
    packed = [samples[number] for number in weights] or [_IDLE]
    ends = torch.tensor([sample.length for sample in packed]).cumsum(0)
    spans = zip(ends.tolist(), packed, strict=True)
    selected = [torch.arange(end - sample.response_length, end) for end, sample in spans]
    counts = torch.tensor([sample.response_length for sample in packed])
    shares = torch.tensor(list(weights.values()) or [0.0], dtype=torch.float32)
    return MicroBatch(
        tokens=torch.tensor([[t for sample in packed for t in sample.tokens[:-1]]], device=device),
        labels=torch.tensor([[t for sample in packed for t in sample.tokens[1:]]], device=device),
        ends=torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(device=device, dtype=torch.int32),
        selected=torch.cat(selected).to(device),
        inputs=LossInputs(
            weights=shares.repeat_interleave(counts).to(device),
            segments=torch.arange(len(packed)).repeat_interleave(counts).to(device),
        ),
        engine_logprobs=torch.tensor([lp for sample in packed for lp in sample.engine_logprobs], device=device),
        samples=list(weights),
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


def with_inputs(minibatch: Minibatch, **values: Sequence[torch.Tensor]) -> Minibatch:
    """The same minibatch with more in its `LossInputs`: field -> one `[selected]` tensor a microbatch."""
    parts = [dict(zip(values, tensors, strict=True)) for tensors in zip(*values.values(), strict=True)]
    return [replace(micro, inputs=replace(micro.inputs, **part)) for micro, part in zip(minibatch, parts, strict=True)]


def attach(minibatch: Minibatch, **values: Sequence[Sequence[float]]) -> Minibatch:
    """As `with_inputs`, from what is known of every sample of the rollout: field -> numbers. [samples][response]"""

    def packed(micro: MicroBatch, known: Sequence[Sequence[float]]) -> torch.Tensor:
        numbers = [number for sample in micro.samples for number in known[sample]]
        return torch.tensor(numbers, dtype=torch.float32, device=micro.selected.device)

    fields = {name: [packed(micro, known) for micro in minibatch] for name, known in values.items()}
    return with_inputs(minibatch, **fields)


def by_sample(minibatch: Minibatch, values: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The way back: number and values of each sample of this rank's part, from one `[selected]` tensor a microbatch."""
    for micro, tensor in zip(minibatch, values, strict=True):
        if micro.samples:
            counts = torch.bincount(micro.inputs.segments, minlength=len(micro.samples))
            yield from zip(micro.samples, tensor.split(counts.tolist()), strict=True)
