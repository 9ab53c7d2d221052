"""Time of a training step by part: products, attention, memory, communication of each kind, bubble, reduction.

A step is as long as its slowest pipeline stage needs for all microbatches, and the bubble (arXiv 2104.04473, 2.2).
Nothing but the share that is given of the experts' communication is hidden behind anything.
"""

from dataclasses import dataclass, fields

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.activations import Tokens
from megatron_r1.model.flops import BACKWARD_AND_FORWARD, attention_weights, head_sizes, mlp_weights, sparse_layers
from megatron_r1.model.memory import Shape, Stage, Work
from megatron_r1.plan.fused import fused_layer_bytes
from megatron_r1.plan.hardware import Hardware
from megatron_r1.plan.memory import unchanged
from megatron_r1.plan.state import Copies, State
from megatron_r1.plan.tensors import chunks

_FLOAT = 4
_NODES = 4
"""Nodes that DeepSeek-V3's router sends a token to at most, and about as many as eight free choices reach of few."""


@dataclass(frozen=True)
class Seconds:
    """Of a step, or of a microbatch on a stage."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """What is neither a product nor attention, bound by memory."""
    recompute: float = 0.0
    experts: float = 0.0
    """The exchange of tokens between experts' ranks that is not hidden, and what the hidden part slows down."""
    tensor: float = 0.0
    context: float = 0.0
    latency: float = 0.0
    """What launches take beyond the work, where that is little."""
    bubble: float = 0.0
    reduction: float = 0.0
    """Gradients to, and weights from, the optimizer's shares."""
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(*(getattr(self, part.name) * factor for part in fields(self)))


@dataclass(frozen=True)
class Manner:
    """How a model is computed, beside its layout."""

    precision: str = "bfloat16"
    """Of linear layers."""
    dispatcher: str = "alltoall"
    overlap: float = 0.0
    """Share of the experts' exchange that is hidden."""
    attended: float | None = None
    """Mean length of a token's own sequence, where rows are packed; None = rows are sequences."""
    offload: float = 0.0
    """Share of the optimizer's state that is updated on the host."""
    kept: int = 12
    """Bytes that the optimizer keeps of a number."""


@dataclass(frozen=True)
class StepTime:
    """A training step."""

    parts: Seconds
    tokens: int
    """Of all ranks."""
    flops: float
    """Of the model, as `model/flops.py` counts them."""
    gpus: int

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.parts.total

    @property
    def tokens_per_gpu(self) -> float:
        """Each second."""
        return self.tokens / self.seconds / self.gpus

    @property
    def flops_per_gpu(self) -> float:
        """Each second."""
        return self.flops / self.seconds / self.gpus


class TrainingTime:
    """Times of one layout.

    Args:
        shape: the model's.
        parallel: the run's [parallel].
        work: what a rank is given in a step.
        manner: how it is computed.
        hardware: where.
    """

    def __init__(self, shape: Shape, parallel: ParallelSection, work: Work, manner: Manner, hardware: Hardware) -> None:
        self._shape, self._parallel, self._work = shape, parallel, work
        self._manner, self._hardware = manner, hardware
        self.copies = Copies.of(parallel, work.processes)
        self._tokens = Tokens(work.microbatch, work.sequence_length // parallel.context, parallel.context, 1, True)
        self._kinds = sparse_layers(shape.config)
        attended = manner.attended or work.sequence_length
        self.rank_tokens = self._tokens.count / parallel.tensor
        """Of a microbatch, as sequence parallelism cuts it."""
        self._pairs = attended / 2
        self._layers = {sparse: self._layer(sparse) for sparse in set(self._kinds)}
        self._stages = chunks(shape, parallel)

    def step(self, worst: State) -> StepTime:
        """A whole step.

        Args:
            worst: state of the rank that holds most.
        """
        ranks, parts, count = self._parallel.pipeline, self._parallel.virtual_pipeline, self._work.microbatches
        of_stages = [self.microbatch(stage) for stage in range(ranks)]
        slowest = max(of_stages, key=lambda seconds: seconds.total) * count
        bubble = slowest.total * (ranks - 1) / (count * parts)
        ends = Seconds(bubble=bubble, reduction=self._reduction(worst), optimizer=self._optimizer(worst))
        data = self._work.processes // (self._parallel.tensor * self._parallel.context * ranks)
        tokens = self._work.microbatch * self._work.sequence_length * count * data
        return StepTime(slowest + ends, tokens, self.flops(tokens), self._work.processes)

    def microbatch(self, stage: int, forward_only: bool = False) -> Seconds:
        """One microbatch on a pipeline stage, on all its virtual parts."""
        total = Seconds()
        for chunk in self._stages[stage]:
            for number in chunk.layers:
                total += self._layers[self._kinds[number]]
            total += self._layers[self._kinds[-1]] * chunk.mtp + self._ends(chunk)
        if forward_only:
            total = (total + Seconds(recompute=-total.recompute)) * (1 / BACKWARD_AND_FORWARD)
        sent = self.rank_tokens * self._shape.config.hidden_size * self._shape.config.params_dtype.itemsize
        if self._parallel.pipeline > 1:
            total += Seconds(bubble=0.0, latency=2 * len(self._stages[stage]) * sent / self._hardware.network)
        return total

    def scoring(self, microbatches: float) -> float:
        """Seconds of forward passes over so many microbatches."""
        ranks = self._parallel.pipeline
        slowest = max(self.microbatch(stage, forward_only=True).total for stage in range(ranks))
        return slowest * (microbatches + (ranks - 1) / self._parallel.virtual_pipeline)

    def flops(self, tokens: float) -> float:
        """Of the model in a step of so many tokens, forward and backward pass."""
        config = self._shape.config
        layers = [*self._kinds, *[self._kinds[-1]] * (config.mtp_num_layers or 0)]
        each = sum(2 * self._weights(sparse) + self._scores() for sparse in layers)
        head = 2 * self._shape.outputs * config.hidden_size
        joined = 4 * config.hidden_size**2
        mtp = config.mtp_num_layers or 0
        return BACKWARD_AND_FORWARD * tokens * (each + head + mtp * (head + joined))

    def _weights(self, sparse: bool) -> float:
        """Numbers of one layer that a token is multiplied with."""
        config = self._shape.config
        attention = float(sum(attention_weights(config).values()))
        if not sparse:
            return attention + mlp_weights(config, config.ffn_hidden_size)
        chosen = config.moe_router_topk * mlp_weights(config, config.moe_ffn_hidden_size or 0)
        shared = mlp_weights(config, config.moe_shared_expert_intermediate_size or 0)
        return attention + chosen + shared + config.hidden_size * (config.num_moe_experts or 0)

    def _scores(self) -> float:
        """Operations of a token in one layer's attention, forward, the masked half left out."""
        config = self._shape.config
        return 2 * self._pairs * config.num_attention_heads * sum(head_sizes(config))

    def _layer(self, sparse: bool) -> Seconds:
        """One layer and microbatch on one rank, forward and backward."""
        config, machine, tokens = self._shape.config, self._hardware, self.rank_tokens
        precision = self._manner.precision
        products = tokens * 6 * self._weights(sparse) / machine.products[precision]
        attention = tokens * BACKWARD_AND_FORWARD * self._scores() / machine.attention
        kept = fused_layer_bytes(unchanged(config), sparse, self._tokens) / self._parallel.tensor
        memory = kept * machine.passes[precision] / machine.memory_rate
        exchange = self._exchange() if sparse else 0.0
        tensor = self._tensor_traffic()
        context = self._context_traffic()
        working = products + attention + memory + exchange + tensor + context
        floor = BACKWARD_AND_FORWARD * machine.layer_latency
        return Seconds(
            products=products,
            attention=attention,
            memory=memory,
            recompute=self._again(sparse, products + attention + memory + exchange + tensor),
            experts=exchange,
            tensor=tensor,
            context=context,
            latency=max(0.0, floor - working),
        )

    def _again(self, sparse: bool, all_: float) -> float:
        """Seconds of what is computed twice."""
        config, machine = self._shape.config, self._hardware
        if config.recompute_granularity is None:
            return 0.0
        if config.recompute_granularity == "full":
            return all_ / BACKWARD_AND_FORWARD
        again = set(config.recompute_modules or ())
        rate = machine.products[self._manner.precision]
        weights = 0.0
        if "mla_up_proj" in again:
            weights += sum(numbers for name, numbers in attention_weights(config).items() if "up_proj" in name)
        if "mlp" in again and not sparse:
            weights += mlp_weights(config, config.ffn_hidden_size)
        if "moe" in again and sparse:
            weights += self._weights(True) - sum(attention_weights(config).values())
        elif "shared_experts" in again and sparse:
            weights += mlp_weights(config, config.moe_shared_expert_intermediate_size or 0)
        seconds = self.rank_tokens * 2 * weights / rate
        if "moe" in again and sparse:
            seconds += self._exchange() / 2
        if "core_attn" in again:
            seconds += self.rank_tokens * self._scores() / machine.attention
        return seconds

    def _exchange(self) -> float:
        """Seconds that one layer's tokens to experts and back cost, forward and backward."""
        config, ranks = self._shape.config, self._parallel.expert * self._parallel.expert_tensor
        if ranks == 1:
            return 0.0
        within = min(ranks, self._hardware.gpus_per_node)
        nodes = ranks / within
        size = config.hidden_size * (2 + 2)  # there and back in bfloat16
        chosen = config.moe_router_topk
        copies = min(chosen, _NODES, nodes) if self._manner.dispatcher == "deepep" else chosen
        outside = (
            copies * (nodes - 1) / nodes if self._manner.dispatcher == "deepep" else chosen * (ranks - within) / ranks
        )
        inside = chosen * (within - 1) / within
        seconds = max(outside / self._hardware.network, inside / self._hardware.node_link)
        whole, hidden = 2 * self.rank_tokens * size * seconds, self._manner.overlap
        return whole * (1 - hidden + hidden * self._hardware.exchange_share)

    def _tensor_traffic(self) -> float:
        """Seconds of a layer's gathers and scatters: two of each, and their like and one gather more backward."""
        ranks = self._parallel.tensor
        link = self._hardware.node_link if ranks <= self._hardware.gpus_per_node else self._hardware.network
        size = self.rank_tokens * self._shape.config.hidden_size * self._shape.config.params_dtype.itemsize
        return 10 * size * (ranks - 1) / link

    def _context_traffic(self) -> float:
        """Seconds of keys and values from the other context-parallel ranks, and of their gradients."""
        config, ranks = self._shape.config, self._parallel.context
        if ranks == 1:
            return 0.0
        groups = config.num_attention_heads if config.multi_latent_attention else config.num_query_groups or 1
        size = self.rank_tokens * groups * sum(head_sizes(config)) * config.params_dtype.itemsize
        span = ranks * self._parallel.tensor
        link = self._hardware.node_link if span <= self._hardware.gpus_per_node else self._hardware.network
        return 2 * size * (ranks - 1) / link

    def _ends(self, chunk: Stage) -> Seconds:
        """Heads, in the model's own precision."""
        config, own = self._shape.config, self._hardware.products[_own_precision(self._shape)]
        heads = chunk.head * (1 + chunk.mtp)
        numbers = heads * self._shape.outputs * config.hidden_size + chunk.mtp * 2 * config.hidden_size**2
        logits = heads * self._shape.outputs * 4 * self._hardware.passes[_own_precision(self._shape)]
        return Seconds(
            products=self.rank_tokens * 6 * numbers / own,
            memory=self.rank_tokens * logits / self._hardware.memory_rate,
        )

    def _reduction(self, state: State) -> float:
        """Gradients are summed and cut, weights gathered: each byte once through the slower link."""
        if self.copies.dense == 1:
            return 0.0
        per_node = self._hardware.gpus_per_node
        link = self._hardware.node_link if self._work.processes <= per_node else self._hardware.network
        return (state.gradients + state.weights) / link

    def _optimizer(self, state: State) -> float:
        """Each byte of its state read and written, each gradient read; on the host what lies there, and the way."""
        machine, away = self._hardware, state.optimizer * self._manner.offload
        here = 2 * (state.optimizer - away) + state.gradients
        moved = away / self._manner.kept * (_FLOAT + self._shape.config.params_dtype.itemsize)
        return here / machine.memory_rate + 2 * away / machine.host_rate + moved / machine.host_link


def _own_precision(shape: Shape) -> str:
    return str(shape.config.params_dtype).removeprefix("torch.")
