"""Samples and corpus rows -> the microbatches that one rank feeds its model."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megatron_r1.data.packing import deal, packs_needed, partition
from megatron_r1.loss.base import Loss, LossInputs
from megatron_r1.train.layout import Alignment, Row, lay
from megatron_r1.types import Group


@dataclass(frozen=True)
class Trajectory:
    """A prompt and its response, ready to train on."""

    tokens: list[int]
    """Prompt, then response. [prompt + response]"""
    response_length: int
    engine_logprobs: list[float] = field(default_factory=list)
    """[sampled], or empty where no engine sampled it."""
    routed_experts: np.ndarray | None = field(default=None, compare=False)
    """See `Sample.routed_experts`. [prompt + response - 1, layers, experts a token]"""
    mask: list[bool] = field(default_factory=list)
    """Which tokens of the response are learned from; empty = all. [response]"""

    @property
    def length(self) -> int:
        """Tokens that the model is fed: all but the last, which is only predicted."""
        return len(self.tokens) - 1

    @property
    def sampled(self) -> int:
        """Tokens that are learned from."""
        return sum(self.mask) if self.mask else self.response_length

    def selected(self, stop: int) -> torch.Tensor:
        """Positions that predict these, in a row where its own positions end before `stop`. [sampled]"""
        positions = torch.arange(stop - self.response_length, stop)
        return positions[torch.tensor(self.mask)] if self.mask else positions


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
    padding: torch.Tensor | None = None
    """True where no token stands; None = nowhere. [rows, seq]"""
    routed_experts: torch.Tensor | None = None
    """Where the tokens go, in the host's memory; None = where the model's routers send them.
    [rows, seq, layers, experts a token]"""

    @property
    def count(self) -> int:
        """Tokens."""
        return self.tokens.numel() - (0 if self.padding is None else int(self.padding.sum()))


Minibatch = list[MicroBatch]
"""What one rank contributes to one optimizer update."""


def trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    """One trajectory for each sample, in order."""
    return [
        Trajectory(
            tokens=group.prompt_tokens + sample.tokens,
            response_length=len(sample.tokens),
            engine_logprobs=sample.logprobs,
            routed_experts=sample.routed_experts,
            mask=sample.mask,
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
    alignment: Alignment = field(default_factory=Alignment)
    multiple: int = 1
    """What the number of a minibatch's microbatches divides by."""
    equal: bool = False
    """Whether the rows of a minibatch have to be of one length."""

    def packs(self, hands: Sequence[Sequence[int]]) -> int:
        """How many microbatches every rank has. `hands`: lengths of each rank's sequences."""
        most = max(packs_needed(hand, self.capacity) for hand in hands)
        return -(-most // self.multiple) * self.multiple

    def length(self, packs: Sequence[Sequence[int]]) -> int:
        """What every row of a minibatch is filled up to, 0 = to what it needs. `packs`: lengths of each row's parts."""
        return max(map(self.alignment.held, packs)) if self.equal else 0


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
        weights = loss.token_weights([samples[index].sampled for index in chosen])
        hands = deal(lengths, share.ranks)
        packs = share.packs([[lengths[i] for i in hand] for hand in hands])
        mine = hands[share.rank]
        for_rank = partition([lengths[i] for i in mine], packs)
        length = share.length([[lengths[mine[i]] for i in pack] for pack in for_rank])
        yield [_pack(samples, {chosen[mine[i]]: weights[mine[i]] for i in pack}, share, length) for pack in for_rank]


def _pack(samples: Sequence[Trajectory], weights: dict[int, float], share: Share, length: int) -> MicroBatch:
    """Lay sequences one behind the other. `weights`: sample's number -> weight of its tokens; none = an idle pass."""
    packed = [samples[number] for number in weights]
    tokens, labels = [part.tokens[:-1] for part in packed], [part.tokens[1:] for part in packed]
    row = lay(tokens, labels, share.alignment, length)
    spans = zip(row.stops, packed, strict=True)
    selected = [part.selected(stop) for stop, part in spans]
    counts = torch.tensor([part.sampled for part in packed], dtype=torch.long)
    shares = torch.tensor(list(weights.values()), dtype=torch.float32)
    inputs = LossInputs(
        weights=shares.repeat_interleave(counts).to(share.device),
        segments=torch.arange(len(packed)).repeat_interleave(counts).to(share.device),
    )
    engine_logprobs = torch.tensor([lp for part in packed for lp in part.engine_logprobs], device=share.device)
    return from_row(
        row,
        selected,
        inputs,
        share.device,
        engine_logprobs=engine_logprobs,
        samples=list(weights),
        routed_experts=_experts(row, packed),
    )


def _experts(row: Row, packed: Sequence[Trajectory]) -> torch.Tensor | None:
    """Of every position of a row, None where they are not known; at padding they mean nothing."""
    known = [part.routed_experts for part in packed if part.routed_experts is not None]
    if not known or len(known) < len(packed):
        return None
    laid = torch.zeros(1, row.tokens.size(1), *known[0].shape[1:], dtype=torch.from_numpy(known[0]).dtype)
    for stop, experts in zip(row.stops, known, strict=True):
        laid[0, stop - len(experts) : stop] = torch.from_numpy(experts)
    return laid


def from_row(
    row: Row, selected: Sequence[torch.Tensor], inputs: LossInputs, device: torch.device, **more: Any
) -> MicroBatch:
    """A microbatch of packed sequences; `selected`: of each sequence the positions that count."""
    return MicroBatch(
        tokens=row.tokens.to(device),
        labels=row.labels.to(device),
        ends=row.ends.to(device),
        padding=None if row.padding is None else row.padding.to(device),
        selected=torch.cat([torch.zeros(0, dtype=torch.long), *selected]).to(device),
        inputs=inputs,
        **more,
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
    """As `with_inputs`, from what is known of every sample of the rollout: field -> numbers. [samples][sampled]"""

    def packed(micro: MicroBatch, known: Sequence[Sequence[float]]) -> torch.Tensor:
        numbers = [number for sample in micro.samples for number in known[sample]]
        return torch.tensor(numbers, dtype=torch.float32, device=micro.selected.device)

    fields = {name: [packed(micro, known) for micro in minibatch] for name, known in values.items()}
    return with_inputs(minibatch, **fields)


def routed_freely(minibatch: Minibatch) -> Minibatch:
    """The same minibatch for another model than the one that was recorded: its routers choose."""
    return [replace(micro, routed_experts=None) for micro in minibatch]


def by_sample(minibatch: Minibatch, values: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The way back: number and values of each sample of this rank's part, from one `[selected]` tensor a microbatch."""
    for micro, tensor in zip(minibatch, values, strict=True):
        if micro.samples:
            counts = torch.bincount(micro.inputs.segments, minlength=len(micro.samples))
            yield from zip(micro.samples, tensor.split(counts.tolist()), strict=True)
