"""The rollout fleet: how many tokens its caches hold, and how long a rollout takes with lengths that differ.

An engine decodes what its cache holds at once, and takes the next sample when one ends (continuous batching). A step
reads the weights that the batch touches and the caches of its samples, and takes a latency for each layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from statistics import NormalDist

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.model.flops import attention_weights, head_sizes, mlp_weights, sparse_layers
from megatron_r1.model.memory import Shape
from megatron_r1.plan.hardware import Hardware
from megatron_r1.plan.tensors import Counts

_CACHE = 2
"""Bytes of a number in the cache: bfloat16."""
_WORKING = 4 * 2**30
"""Bytes that vLLM keeps for activations and CUDA graphs of a large model."""
_STRIDE = 32
"""Decoding steps that are counted at once."""


_ACCEPTED = 0.85
"""Share of the tokens an MTP layer proposes that the model would have chosen: 85 to 90 % (DeepSeek-V3, 5.4.3)."""


@dataclass(frozen=True)
class Engine:
    """One vLLM engine, on one node or several."""

    gpus: int
    """Over which its weights are cut, tensor- or expert-parallel."""
    weight: float
    """Bytes of a number of its weights."""
    sequences: int
    """That each of its copies decodes at once, at most (`max_num_seqs`)."""
    eager: bool = False
    """Without CUDA graphs (`--enforce-eager`)."""
    copies: int = 1
    """Of attention, each with sequences and a cache of its own; experts are cut over all GPUs
    (`--data-parallel-size`)."""
    redundant: int = 0
    """Experts of a layer that are there twice, so that no GPU has more work than others."""
    drafted: int = 0
    """Tokens that the MTP layer proposes in each step."""
    memory: float | None = None
    """Share of a GPU that it takes (`--gpu-memory-utilization`); None = vLLM's default."""
    cache: float = _CACHE
    """Bytes of a number in its cache."""

    @property
    def gain(self) -> float:
        """Tokens of a sample that a step gives."""
        return sum(_ACCEPTED**number for number in range(self.drafted + 1))


@dataclass(frozen=True)
class Lengths:
    """Lengths of responses: log-normal, cut at the longest."""

    mean: float
    spread: float
    """Standard deviation of the logarithm."""
    longest: int

    def sample(self, count: int) -> list[int]:
        """So many quantiles of it, in an order that is mixed and always the same."""
        if not self.spread:
            return [min(self.longest, round(self.mean))] * count
        normal = NormalDist(self._location(), self.spread)
        drawn = [self._cut(normal.inv_cdf((number + 0.5) / count)) for number in range(count)]
        step = next(step for step in range(max(1, round(count * 0.618)), 2 * count + 1) if math.gcd(step, count) == 1)
        return [drawn[number * step % count] for number in range(count)]

    def _cut(self, logarithm: float) -> int:
        return max(1, min(self.longest, round(math.exp(logarithm))))

    def _location(self) -> float:
        """Where the logarithm's middle has to be so that the mean of what is cut is `mean`."""
        quantiles = [NormalDist(0.0, self.spread).inv_cdf((number + 0.5) / 256) for number in range(256)]
        low, high = 0.0, math.log(self.longest) + 4 * self.spread
        for _ in range(60):
            middle = (low + high) / 2
            mean = sum(min(self.longest, math.exp(middle + quantile)) for quantile in quantiles) / len(quantiles)
            low, high = (middle, high) if mean < self.mean else (low, middle)
        return low


def cache_bytes(config: TransformerConfig, engine: Engine) -> float:
    """Of a token on one GPU of its copy: latent attention has one head, which all tensor-parallel ranks hold."""
    if config.multi_latent_attention:
        return (config.kv_lora_rank + config.qk_pos_emb_head_dim) * config.num_layers * engine.cache
    groups = config.num_query_groups or config.num_attention_heads
    held = max(1.0, groups * engine.copies / engine.gpus)
    return held * sum(head_sizes(config)) * config.num_layers * engine.cache


def engine_weights(shape: Shape, engine: Engine, counts: Counts) -> float:
    """Bytes of weights on one of its GPUs."""
    routed, dense = counts.routed, counts.dense
    if engine.drafted:
        own = mlp_weights(shape.config, shape.config.moe_ffn_hidden_size or 0) * (shape.config.num_moe_experts or 0)
        routed, dense = routed + min(own, counts.mtp), dense + max(0, counts.mtp - own)
    more = 1 + engine.redundant / (shape.config.num_moe_experts or 1)
    return (dense * engine.copies + routed * more) * engine.weight / engine.gpus


def cache_tokens(shape: Shape, engine: Engine, counts: Counts, hardware: Hardware) -> int:
    """That an engine has room for beside its weights, on all its copies; below 0 where those do not fit."""
    taken = hardware.memory * (engine.memory or hardware.engine_memory)
    room = taken - _WORKING - engine_weights(shape, engine, counts)
    return int(room / cache_bytes(shape.config, engine)) * engine.copies


class Decoding:
    """How long an engine's decoding steps take.

    Args:
        shape: the model's; of its MTP layers one counts as another layer where the engine drafts.
        engine: that decodes.
        hardware: where.
    """

    def __init__(self, shape: Shape, engine: Engine, hardware: Hardware) -> None:
        config = shape.config
        self._engine, self._hardware, self._config = engine, hardware, config
        kinds = sparse_layers(config) + [sparse_layers(config)[-1]] * min(1, engine.drafted)
        attention = sum(attention_weights(config).values())
        shared = mlp_weights(config, config.moe_shared_expert_intermediate_size or 0)
        self._expert = mlp_weights(config, config.moe_ffn_hidden_size or 0) if any(kinds) else 0
        self._sparse, self._layers = sum(kinds), len(kinds)
        self._dense = len(kinds) * attention + self._sparse * shared + shape.outputs * config.hidden_size
        self._dense += (len(kinds) - self._sparse) * mlp_weights(config, config.ffn_hidden_size)

    def step(self, samples: int, tokens: float) -> float:
        """Seconds of one step of each sample.

        Args:
            samples: that are decoded.
            tokens: in their caches together.
        """
        engine, config = self._engine, self._config
        experts, chosen = config.num_moe_experts or 0, config.moe_router_topk or 0
        computed = samples * (1 + engine.drafted)
        touched = experts * (1 - (1 - chosen / experts) ** computed) if experts else 0.0
        dense = self._dense * engine.copies
        weights = (dense + self._sparse * touched * self._expert) * engine.weight / engine.gpus
        caches = tokens / engine.copies * cache_bytes(config, engine)
        reading = (weights + caches) / self._hardware.memory_rate
        active = self._dense + self._sparse * chosen * self._expert
        rate = self._hardware.products["fp8" if engine.weight == 1 else "bfloat16"]
        computing = 2 * active * computed / engine.gpus / rate
        several = engine.gpus > self._hardware.gpus_per_node
        span = ("eager" if engine.eager else "nodes") if several else "node"
        return max(reading, computing) + self._layers * self._hardware.decode_layer[span]

    def rollout(self, lengths: Sequence[int], prompt: float, capacity: int) -> tuple[float, float]:
        """Seconds until an engine has answered all, and of that the seconds after its last sample has begun.

        Args:
            lengths: of its responses, in the order in which they are asked for.
            prompt: tokens of a prompt.
            capacity: tokens that its cache holds.
        """
        waiting = list(reversed(lengths))
        ends: list[tuple[int, int, int]] = []
        clock, steps, cached, tail = 0.0, 0, 0.0, 0.0
        started, gain = 0, self._engine.gain
        most = self._engine.sequences * self._engine.copies
        while waiting or ends:
            while waiting and len(ends) < most and (not ends or cached + prompt < capacity):
                length = math.ceil(waiting.pop() / gain)
                heappush(ends, (steps + length, started, steps))
                cached += prompt
                started += 1
            stride = max(1, min(_STRIDE, ends[0][0] - steps))
            seconds = self.step(len(ends), cached) * stride
            clock, tail = clock + seconds, tail + seconds if not waiting else 0.0
            steps += stride
            cached += len(ends) * stride * gain
            while ends and ends[0][0] <= steps:
                _, _, begun = heappop(ends)
                cached -= prompt + (steps - begun) * gain
        return clock, tail
