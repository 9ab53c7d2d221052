"""Memory of a rank by part and by phase: what it holds at load, in training, while it saves and while it scores."""

import copy
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.activations import Tokens, head_bytes, layer_bytes, mtp_bytes
from megatron_r1.model.flops import sparse_layers
from megatron_r1.model.memory import Shape, Work, predict
from megatron_r1.plan.fused import fused_layer_bytes
from megatron_r1.plan.hardware import Hardware
from megatron_r1.plan.state import State, States

_FLOAT = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, and of the others like it."""

    rank: int
    """The first of them."""
    ranks: int
    """How many hold the same."""
    stage: int
    layers: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, float]
    """By layer, of all microbatches under way."""
    recomputed: float
    """The most that the backward pass makes again at once."""
    logits: float
    """Of the output layer, besides what is kept."""
    exchange: float
    """Tokens on their way to experts and back."""
    buffers: float
    """What fills the buffers up, counters of experts, 8-bit copies of the weights."""
    communication: float
    context: float
    peaks: dict[str, float]
    """At load, train and save; in reinforcement learning also at score, sync and wake."""
    host: dict[str, float]
    """On its host: the reference policy, what a checkpoint copies, the part of the optimizer that lies there."""

    @property
    def activation_total(self) -> float:
        """Of all layers."""
        return sum(self.activations.values())

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to the peak in training, but for what fragmentation loses."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activation_total,
            "recomputed": self.recomputed,
            "logits": self.logits,
            "exchange": self.exchange,
            "buffers": self.buffers,
            "communication": self.communication,
            "context": self.context,
        }


@dataclass(frozen=True)
class Setting:
    """How a run is kept in memory, beside its layout."""

    fused: bool = False
    eight: int = 0
    """Bytes of 8-bit copies of a matrix's number, beside its weight."""
    transport: str = ""
    """Of weights to engines; empty = there are none."""
    transfer_buffer: float = 0.0
    """Bytes of tensors that the transports from GPU to GPU pack together."""
    shared_gpus: int = 0
    """GPUs of the first ranks that engines have, too."""
    engine: float = 0.0
    """Bytes that engines take of each of these."""
    sleeps: bool = False
    """They give them back while the policy is trained, but for their context."""
    reference: bool = False
    """There is a reference policy, on the host, exchanged with the policy to score."""
    offload: float = 0.0
    """Share of the optimizer's state that lies on the host."""
    kept: int = 12
    """Bytes that the optimizer keeps of a number, wherever."""
    asynchronous: bool = False
    """Checkpoints are copied to the host and written while training goes on."""


class MemoryPlan:
    """Memory of all ranks of a layout.

    Args:
        shape: the model's.
        parallel: the run's [parallel].
        work: what is trained on.
        setting: how.
        hardware: where.
    """

    def __init__(self, shape: Shape, parallel: ParallelSection, work: Work, setting: Setting, hardware: Hardware):
        self._shape, self._parallel, self._work = shape, parallel, work
        self._setting, self._hardware = setting, hardware
        self._tokens = Tokens(
            rows=work.microbatch,
            length=work.sequence_length // parallel.context,
            context=parallel.context,
            tensor=parallel.tensor,
            on_gpu=True,
        )

    def ranks(self, states: States) -> list[RankMemory]:
        """The distinct ones, in the order of ranks."""
        found = []
        by_stage: dict[int, dict[str, float]] = {}
        per_stage = self._work.processes // self._parallel.pipeline
        for rank, count, state in states.distinct():
            stage = rank // per_stage
            kept = by_stage.setdefault(stage, self._activations(states, stage))
            found.append(self._rank(states, (rank, count, stage), state, kept))
        return found

    def _rank(self, states: States, where: tuple[int, int, int], state: State, kept: dict[str, float]) -> RankMemory:
        rank, count, stage = where
        head = any(chunk.head for chunk in states.chunks[stage])
        eight = self._setting.eight * sum(one.numbers for one in states.held(stage) if _is_matrix(one.name))
        optimizer = round(state.optimizer * (1 - self._setting.offload))
        logits = self._logits() if head else 0.0
        recomputed = self._recomputed(states, stage)
        exchange = self._exchange(states, stage)
        buffers = state.filling + eight
        groups, context = self._groups() * self._hardware.communicator, self._hardware.context
        fixed = state.weights + state.gradients + optimizer + buffers
        lost = 1 + self._hardware.lost
        train = (fixed + sum(kept.values()) + recomputed + logits + exchange) * lost + groups + context
        peaks = {
            "load": max(2 * state.weights + state.filling + state.gradients, fixed) * lost + context,
            "train": train,
            # The optimizer's state of a bucket is put together on the first rank of its copies, array by array.
            "save": (fixed + state.gradients * _FLOAT // self._gradient(state)) * lost + groups + context,
        }
        host = {}
        if self._setting.offload:
            # Beside what the optimizer keeps, gradients in float32.
            host["optimizer"] = state.optimizer * self._setting.offload * (1 + _FLOAT / self._setting.kept)
        if self._setting.transport:
            # Over NCCL the first rank is in a group with the engines, too.
            joined = self._hardware.communicator if self._setting.transport == "nccl" and rank == 0 else 0.0
            peaks["sync"] = (fixed + self._sent(states, stage, first=rank == 0)) * lost + groups + joined + context
        if self._setting.reference:
            forward = max(self._once(states, stage), default=0.0)
            peaks["score"] = (fixed + state.weights + 2 * forward + logits + exchange) * lost + groups + context
            host["reference policy"] = float(state.weights)
        if rank < self._setting.shared_gpus:
            wake = peaks["sync"] + self._setting.engine  # new weights come to engines that are awake
            asleep = self._hardware.context if self._setting.sleeps else self._setting.engine
            peaks = {phase: peak + asleep for phase, peak in peaks.items()} | {"wake": wake}
        if self._setting.asynchronous:
            host["checkpoint"] = float(state.weights + state.optimizer)
        return RankMemory(
            rank=rank,
            ranks=count,
            stage=stage,
            layers=tuple(layer for chunk in states.chunks[stage] for layer in chunk.layers),
            parameters=state.parameters,
            weights=state.weights,
            gradients=state.gradients,
            optimizer=optimizer,
            activations=kept,
            recomputed=recomputed,
            logits=logits,
            exchange=exchange,
            buffers=buffers,
            communication=groups,
            context=context,
            peaks=peaks,
            host=host,
        )

    def _sent(self, states: States, stage: int, first: bool) -> float:
        """Tensors on their way to engines: parts, and whole ones where they are put together.

        That is the first rank, but by "disk" every rank that holds parts which tensor parallelism has cut.
        """
        largest = max(one.numbers for one in states.held(stage)) * self._shape.config.params_dtype.itemsize
        collects = self._parallel.tensor > 1 if self._setting.transport == "disk" else first
        if not collects:
            return largest
        whole = largest * self._parallel.tensor
        return 2 * whole + packed(self._setting.transport, self._setting.transfer_buffer, whole)

    def _gradient(self, state: State) -> int:
        """Bytes of a gradient."""
        return max(1, round(state.gradients / max(1, state.parameters)))

    def _layer(self, config: TransformerConfig, sparse: bool) -> float:
        layer = fused_layer_bytes if self._setting.fused else layer_bytes
        return layer(config, sparse, self._tokens)

    def _activations(self, states: States, stage: int) -> dict[str, float]:
        """By layer, of all microbatches under way."""
        config, kinds = self._shape.config, sparse_layers(self._shape.config)
        factor = self._under_way(stage)
        kept: dict[str, float] = {}
        for chunk in states.chunks[stage]:
            for number in chunk.layers:
                kept[f"layer {number}"] = self._layer(config, kinds[number]) * factor
            for number in range(chunk.mtp):
                plain = mtp_bytes(config, kinds[-1], self._shape.outputs, self._tokens)
                if self._setting.fused:
                    plain += self._layer(config, kinds[-1]) - layer_bytes(config, kinds[-1], self._tokens)
                kept[f"mtp {number}"] = plain * factor
            if chunk.head:
                kept["head"] = head_bytes(config, self._shape.outputs, self._tokens) * factor
        return kept

    def _under_way(self, stage: int) -> float:
        """Microbatches whose activations a stage keeps at once, on all its parts."""
        one = Work(self._work.processes, self._work.microbatch, self._work.sequence_length, 1)
        single = predict(self._shape, self._parallel, one, stage).activations
        return predict(self._shape, self._parallel, self._work, stage).activations / single if single else 0.0

    def _once(self, states: States, stage: int) -> list[float]:
        """What each layer of a stage makes in a forward pass, nothing being computed again."""
        config, kinds = unchanged(self._shape.config), sparse_layers(self._shape.config)
        numbers = {number for chunk in states.chunks[stage] for number in chunk.layers}
        by_kind = {sparse: self._layer(config, sparse) for sparse in {kinds[number] for number in numbers}}
        return list(by_kind.values())

    def _recomputed(self, states: States, stage: int) -> float:
        """The largest layer's difference between what a forward pass makes and what is kept of it."""
        if self._shape.config.recompute_granularity is None:
            return 0.0
        config, kinds = self._shape.config, sparse_layers(self._shape.config)
        numbers = {number for chunk in states.chunks[stage] for number in chunk.layers}
        return max(
            (
                self._layer(unchanged(config), sparse) - self._layer(config, sparse)
                for sparse in {kinds[number] for number in numbers}
            ),
            default=0.0,
        )

    def _logits(self) -> float:
        """Those of one microbatch in the model's precision, while the loss has them in float32 (what is kept)."""
        if self._shape.outputs == 1:
            return 0.0
        size = self._shape.config.params_dtype.itemsize
        return self._tokens.count * self._shape.outputs * size / self._parallel.tensor

    def _exchange(self, states: States, stage: int) -> float:
        """Copies of one layer's tokens that are sent and received, forward or backward, each in two arrays."""
        config, kinds = self._shape.config, sparse_layers(self._shape.config)
        held = any(kinds[number] for chunk in states.chunks[stage] for number in chunk.layers)
        if not held or self._parallel.expert == 1:
            return 0.0
        copies = self._tokens.count * (config.moe_router_topk or 0) / self._parallel.tensor
        return 2 * copies * config.hidden_size * config.params_dtype.itemsize

    def _groups(self) -> int:
        """Process groups with more than one rank that one rank is in.

        Weights and samples travel in that of all ranks, pipeline stages in their own: no pair of ranks has one.
        """
        own, gpus = self._parallel, self._work.processes
        data = gpus // (own.tensor * own.context * own.pipeline)
        expert_data = gpus // (own.pipeline * own.expert * own.expert_tensor)
        sizes = [
            gpus, own.tensor, own.context, data, data * own.context, own.tensor * own.context, own.pipeline,
            own.tensor * own.pipeline, own.expert, own.expert_tensor, own.expert * own.expert_tensor, expert_data,
        ]  # fmt: skip
        return sum(size > 1 for size in sizes)


def packed(transport: str, buffer: float, largest: float) -> float:
    """Bytes of the first rank's GPU in which a transport packs tensors; `largest`: of one tensor.

    Over NCCL vLLM closes a buffer with the first tensor that fills it, and holds the tensors of one, their copy in one
    piece, and the piece before it, which is still being sent. By CUDA IPC it has one buffer, which any tensor fits in.
    """
    if transport == "nccl":
        return 3 * (buffer + largest)
    return max(buffer, largest) if transport == "ipc" else 0.0


def unchanged(config: TransformerConfig) -> TransformerConfig:
    """The same model with nothing computed again."""
    plain = copy.copy(config)
    plain.recompute_granularity = None
    return plain


def _is_matrix(name: str) -> bool:
    """Whether it is the weight of a linear layer that is computed in 8 bits: not of a head, a router or a norm."""
    return ".linear_" in name and name.endswith(".weight")
