"""Weights, gradients and optimizer state of a rank, to the byte.

Megatron lays the parameters of a chunk out in two buffers, those of routed experts in one of their own
(`_ParamAndGradBuffer` of megatron-core 0.16.1): in reverse order, each from a multiple of 64 numbers on, and filled up
to what divides over the ranks that hold copies. The distributed optimizer keeps of each bucket one equal slice a
rank.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from megatron_r1.config.sections import OptimSection, ParallelSection
from megatron_r1.model.memory import Shape
from megatron_r1.plan.tensors import Tensor, chunks, tensors

_START, _END, _FLOAT = 64, 128, 4
_COUNTS = 2 * _FLOAT
"""Bytes of an expert's selection bias and of its count of tokens, which are never in a lower precision."""


@dataclass(frozen=True)
class State:
    """Bytes on one rank."""

    parameters: int
    """How many numbers the model has there."""
    weights: int
    gradients: int
    """With what fills the buffers up."""
    optimizer: int
    filling: int = 0
    """What fills the buffer of weights up, and the experts' counters."""

    def __add__(self, other: "State") -> "State":
        return State(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Precision:
    """Bytes of a number."""

    weight: int = 2
    gradient: int = 4
    moment: int = 4
    """Each of Adam's two."""
    master: int = 4
    """The optimizer's own copy of a weight; 0 = it works on the weights themselves."""

    @classmethod
    def of(cls, dtype: str, optim: OptimSection) -> "Precision":
        """That of a run."""
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
        whole = dtype == "float32"
        # Transformer Engine's Adam keeps the lower half of a float32 copy alone where the weight is its upper half.
        aware = optim.precision_aware and not optim.offload
        halved = dtype == "bfloat16" and aware and optim.master == "float32"
        return cls(
            weight=sizes[dtype],
            gradient=sizes[optim.gradients],
            moment=sizes[optim.moments],
            master=0 if whole else 2 if halved else sizes[optim.master],
        )

    @property
    def kept(self) -> int:
        """By the optimizer."""
        return self.master + 2 * self.moment


@dataclass(frozen=True)
class Position:
    """Where a rank stands, in Megatron's order of ranks."""

    pipeline: int
    copy: int
    """Among the ranks that hold the same dense weights."""
    routed_copy: int
    """Among those that hold the same routed experts."""


@dataclass(frozen=True)
class Copies:
    """How many ranks hold the same weights."""

    dense: int
    routed: int

    @classmethod
    def of(cls, parallel: ParallelSection, gpus: int) -> "Copies":
        """Those of a layout."""
        return cls(
            gpus // (parallel.tensor * parallel.pipeline),
            gpus // (parallel.pipeline * parallel.expert * parallel.expert_tensor),
        )


def position(parallel: ParallelSection, gpus: int, rank: int) -> Position:
    """That of a rank; tensor-parallel ranks stand beside one another, pipeline ranks farthest apart."""
    per_stage = gpus // parallel.pipeline
    inside = rank % per_stage
    return Position(rank // per_stage, inside // parallel.tensor, inside // (parallel.expert * parallel.expert_tensor))


class States:
    """States of all ranks of a layout.

    Args:
        shape: the model's.
        parallel: the run's [parallel].
        gpus: all processes.
        precision: of what is kept.
    """

    def __init__(self, shape: Shape, parallel: ParallelSection, gpus: int, precision: Precision) -> None:
        self._parallel, self._gpus, self._precision = parallel, gpus, precision
        self._copies = Copies.of(parallel, gpus)
        self._experts = shape.config.num_moe_experts or 0
        self.chunks = chunks(shape, parallel)
        self._held = [[list(tensors(shape, parallel, chunk)) for chunk in parts] for parts in self.chunks]
        self._buffers = [
            [
                _Buffer.of([one for one in held if one.routed is routed], copies)
                for held in parts
                for routed, copies in ((False, self._copies.dense), (True, self._copies.routed))
            ]
            for parts in self._held
        ]

        self._routers = [
            sum(one.name.endswith("router.weight") for held in parts for one in held) for parts in self._held
        ]
        known = {one: one.slices() for one in {one for buffers in self._buffers for one in buffers}}
        self._slices = [[known[one] for one in buffers] for buffers in self._buffers]

    def held(self, stage: int) -> list[Tensor]:
        """Parameters of a pipeline rank."""
        return [tensor for chunk in self._held[stage] for tensor in chunk]

    def of(self, place: Position) -> State:
        """That of one rank."""
        own, total = self._precision, State(0, 0, 0, 0)
        for number, buffer in enumerate(self._buffers[place.pipeline]):
            held = self._slices[place.pipeline][number]
            slice_ = held[place.routed_copy if number % 2 else place.copy]
            total += State(
                buffer.numbers,
                buffer.numbers * own.weight,
                buffer.size * own.gradient,
                slice_ * own.kept,
                (buffer.size - buffer.numbers) * own.weight,
            )
        return total + State(0, 0, 0, 0, self._routers[place.pipeline] * self._experts * _COUNTS)

    def distinct(self) -> Iterator[tuple[int, int, State]]:
        """First rank, number of ranks, and the state that they share, for each pipeline stage's different ones."""
        per_stage = self._gpus // self._parallel.pipeline
        experts = self._parallel.expert * self._parallel.expert_tensor
        inside: dict[tuple[int, int], list[int]] = {}
        for rank in range(per_stage):
            inside.setdefault((rank // self._parallel.tensor, rank // experts), []).append(rank)
        for stage in range(self._parallel.pipeline):
            found: dict[State, list[int]] = {}
            for (number, routed), ranks in inside.items():
                found.setdefault(self.of(Position(stage, number, routed)), []).extend(ranks)
            for state, ranks in found.items():
                yield stage * per_stage + ranks[0], len(ranks), state


@dataclass(frozen=True)
class _Buffer:
    numbers: int
    """Of the parameters alone."""
    size: int
    copies: int
    buckets: tuple[tuple[int, int], ...]
    places: tuple[tuple[int, int], ...]
    """Where each parameter starts and ends."""

    @classmethod
    def of(cls, held: Iterable[Tensor], copies: int) -> "_Buffer":
        places: list[tuple[int, int]] = []
        buckets: list[tuple[int, int]] = []
        start = bucket = 0
        numbers = 0
        for tensor in reversed(list(held)):
            start = _up(start, _START)
            if tensor.alone and places and places[-1][1] > bucket:
                buckets.append((bucket, _up(start, math.lcm(copies, _END))))
                start = bucket = buckets[-1][1]
            places.append((start, start + tensor.numbers))
            start += tensor.numbers
            numbers += tensor.numbers
            if tensor.alone:
                buckets.append((bucket, _up(start, math.lcm(copies, _END))))
                start = bucket = buckets[-1][1]
        if start > bucket:
            buckets.append((bucket, _up(start, math.lcm(copies, _END))))
        return cls(numbers, buckets[-1][1] if buckets else 0, copies, tuple(buckets), tuple(places))

    def slices(self) -> list[int]:
        """Numbers of parameters, without filling, that the optimizer of each copy keeps."""
        totals = [0] * self.copies
        for low, high in self.buckets:
            size = (high - low) // self.copies
            for start, end in self.places:
                if not low <= start < high:
                    continue
                for copy in range((start - low) // size, (end - 1 - low) // size + 1):
                    totals[copy] += min(low + (copy + 1) * size, end) - max(low + copy * size, start)
        return totals


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
