"""Memory of one rank, predicted part by part from the model's config and the layout.

Weights, gradients and optimizer state are counted from the matrices that the rank holds, as Megatron's distributed
optimizer keeps them: gradients in float32; Adam's two moments, and beside bfloat16 weights a float32 copy of them, cut
over the ranks that hold the same weights. Activations are those of `activations`. Not counted are temporaries of
single kernels, buffers of communication and the allocator's losses.
"""

from dataclasses import dataclass, fields

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.activations import Tokens, head_bytes, layer_bytes, mtp_bytes, whole_layer_bytes
from megatron_r1.model.family import HFConfig
from megatron_r1.model.flops import (
    EVERYTHING,
    attention_weights,
    head_sizes,
    mlp_weights,
    output_rows,
    sparse_layers,
    whole_config,
)

_FLOAT = 4
_MOMENTS = 2


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on."""

    config: TransformerConfig
    """The whole model's, with its dtype and what it computes again."""
    outputs: int
    """Rows of the output layer."""
    vocab_size: int
    tied: bool
    """Whether the output layer is the embedding."""

    @classmethod
    def of(cls, hf: HFConfig, section: ModelSection = EVERYTHING) -> "Shape":
        """That of a `config.json`; raises what `flops.whole_config` does."""
        tied = bool(hf.get("tie_word_embeddings", False)) and output_rows(hf) > 1
        return cls(whole_config(hf, section), output_rows(hf), hf["vocab_size"], tied)


@dataclass(frozen=True)
class Work:
    """What all ranks together are given."""

    processes: int
    """Of all nodes."""
    microbatch: int
    """Rows of one forward pass."""
    sequence_length: int
    microbatches: int = 1
    """Of a step on each rank; in a pipeline several are under way at once."""
    on_gpu: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from forward to backward passes, of all microbatches under way."""
    recomputed: float = 0.0
    """With full recomputation, the largest layer's while it is computed again."""

    @property
    def total(self) -> float:
        """Of all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds: a part of the model, or several with virtual stages."""

    layers: tuple[int, ...]
    """Numbers of its layers, from 0."""
    mtp: int
    """MTP layers."""
    embedding: bool
    head: bool
    parts: int


def predict(shape: Shape, parallel: ParallelSection, work: Work, rank: int = 0) -> Memory:
    """Memory of a process.

    Args:
        shape: the model's.
        parallel: the run's [parallel].
        work: what is trained on.
        rank: its pipeline rank.
    """
    config, stage = shape.config, stages(shape.config, parallel)[rank]
    dense, routed = parameters(shape, parallel, stage)
    copies = work.processes // parallel.pipeline
    shards = dense / (copies / parallel.tensor) + routed / (copies / (parallel.expert * parallel.expert_tensor))
    tokens = Tokens(
        rows=work.microbatch,
        length=work.sequence_length // parallel.context,
        context=parallel.context,
        tensor=parallel.tensor,
        on_gpu=work.on_gpu,
    )
    sparse = sparse_layers(config)
    again = [whole_layer_bytes(config, sparse[layer], tokens) for layer in stage.layers]
    return Memory(
        weights=(dense + routed) * config.params_dtype.itemsize,
        gradients=(dense + routed) * _FLOAT,
        optimizer=shards * (_MOMENTS + int(config.bf16)) * _FLOAT,
        activations=_activations(shape, stage, tokens) * _under_way(parallel.pipeline, stage.parts, work, rank),
        recomputed=max(again, default=0.0) if config.recompute_granularity == "full" else 0.0,
    )


def stages(config: TransformerConfig, parallel: ParallelSection) -> list[Stage]:
    """What each pipeline rank holds.

    Args:
        config: the whole model's.
        parallel: the run's [parallel].
    """
    parts = _parts(config, parallel)
    held: list[list[int]] = [[] for _ in range(parallel.pipeline)]
    number = 0
    for part in parts:
        for rank, kinds in enumerate(part):
            count = kinds.count(LayerType.decoder)
            held[rank] += range(number, number + count)
            number += count
    ranks = [[kind for kinds in of_rank for kind in kinds] for of_rank in zip(*parts, strict=True)]
    return [
        Stage(
            layers=tuple(layers),
            mtp=kinds.count(LayerType.mtp),
            embedding=LayerType.embedding in kinds or LayerType.mtp in kinds,
            head=LayerType.loss in kinds,
            parts=len(parts),
        )
        for layers, kinds in zip(held, ranks, strict=True)
    ]


def _parts(config: TransformerConfig, parallel: ParallelSection) -> list[list[list[LayerType]]]:
    """Kinds of layers of each virtual stage of each pipeline rank. [virtual stage][rank][layers]"""
    ranks, mtp = parallel.pipeline, config.mtp_num_layers or 0
    if parallel.pipeline_layout:
        layout = PipelineParallelLayerLayout(parallel.pipeline_layout, ranks).layout
        return [list(part) for part in zip(*layout, strict=True)]
    count = parallel.virtual_pipeline
    each = config.num_layers // (ranks * count)
    parts = [[[LayerType.decoder] * each for _ in range(ranks)] for _ in range(count)]
    parts[0][0].insert(0, LayerType.embedding)
    parts[-1][-1] += [LayerType.mtp] * mtp + [LayerType.loss]
    return parts


def parameters(shape: Shape, parallel: ParallelSection, stage: Stage) -> tuple[float, float]:
    """Parameters on one rank of a stage: all but the routed experts', and theirs."""
    config, tensor = shape.config, parallel.tensor
    hidden, kinds = config.hidden_size, sparse_layers(config)
    kinds_here = [kinds[layer] for layer in stage.layers] + [kinds[-1]] * stage.mtp
    dense = sum(_layer_parameters(config, sparse, tensor) for sparse in kinds_here)
    dense += stage.mtp * (2 * hidden**2 / tensor + 3 * hidden)
    rows = stage.embedding + (stage.head and shape.outputs > 1 and not (shape.tied and stage.embedding))
    dense += rows * shape.vocab_size * hidden / tensor
    # With MTP the trunk's last norm stands behind its last layer, without behind the last stage's.
    last = config.num_layers - 1 in stage.layers if config.mtp_num_layers else stage.head
    dense += hidden * (last + (stage.head and shape.outputs == 1))
    expert = mlp_weights(config, config.moe_ffn_hidden_size or 0) * (config.num_moe_experts or 0)
    return dense, sum(kinds_here) * expert / (parallel.expert * parallel.expert_tensor)


def _layer_parameters(config: TransformerConfig, sparse: bool, tensor: int) -> float:
    """One layer's on one rank, without routed experts."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    matrices = sum(attention_weights(config).values())
    norms = 2 * hidden
    if config.multi_latent_attention:
        norms += (config.q_lora_rank or 0) + config.kv_lora_rank
    elif config.qk_layernorm:
        norms += 2 * config.kv_channels
    if config.add_qkv_bias:
        matrices += (heads + 2 * (config.num_query_groups or heads)) * head_sizes(config)[0]
    if not sparse:
        return (matrices + mlp_weights(config, config.ffn_hidden_size)) / tensor + norms
    shared = mlp_weights(config, config.moe_shared_expert_intermediate_size or 0)
    return (matrices + shared) / tensor + norms + hidden * config.num_moe_experts


def _activations(shape: Shape, stage: Stage, tokens: Tokens) -> float:
    """Of one microbatch on all parts of a stage."""
    config, kinds = shape.config, sparse_layers(shape.config)
    layers = sum(layer_bytes(config, kinds[layer], tokens) for layer in stage.layers)
    mtp = stage.mtp * mtp_bytes(config, kinds[-1], shape.outputs, tokens)
    return layers + mtp + (head_bytes(config, shape.outputs, tokens) if stage.head else 0.0)


def _under_way(ranks: int, parts: int, work: Work, rank: int) -> float:
    """Microbatches whose activations a pipeline rank holds at once, each on all its parts.

    Megatron's warm-up and the one that is under way (schedules.py:get_pp_rank_microbatches): one forward, one backward
    (arXiv 2104.04473), or interleaved.
    """
    if parts == 1:
        return min(work.microbatches, ranks - rank)
    warm_up = 2 * (ranks - rank - 1) + (parts - 1) * ranks
    return min(warm_up + 1, work.microbatches * parts) / parts
