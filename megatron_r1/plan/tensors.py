"""The parameters that a rank holds, one by one and in Megatron's order, by arithmetic alone.

`proof.py` compares them with those of the real modules.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.flops import attention_weights, head_sizes, mlp_weights, sparse_layers
from megatron_r1.model.memory import Shape, Stage, stages


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter of a rank."""

    name: str
    numbers: int
    routed: bool = False
    """One of a routed expert, whose copies are fewer."""
    alone: bool = False
    """A word embedding that two stages share: its gradients have a bucket of their own."""


@dataclass(frozen=True)
class Counts:
    """Numbers of a whole model, by where they stand."""

    dense: int
    routed: int
    """Of routed experts."""
    mtp: int
    """Of MTP layers, which are in neither of the others; embedding and head are the trunk's."""
    biases: int
    """That select experts: buffers of the trunk's routers, not trained by gradients."""

    @property
    def main(self) -> int:
        """Of the model that generates, as its checkpoint counts them."""
        return self.dense + self.routed + self.biases


def count(shape: Shape) -> Counts:
    """Those of a model."""
    config, whole = shape.config, ParallelSection()
    kinds, all_ = sparse_layers(config), stages(config, whole)[0]
    held = list(tensors(shape, whole, replace(all_, layers=all_.layers[-1:])))
    for sparse, layers in Counter(kinds[:-1]).items():  # layers of a kind are all alike
        held += [replace(one, numbers=one.numbers * layers) for one in _layer(config, whole, sparse, "decoder")]
    own = [one for one in held if not one.name.startswith("mtp.")]
    routed = sum(one.numbers for one in own if one.routed)
    biased = sum(kinds) if config.moe_router_enable_expert_bias else 0
    return Counts(
        dense=sum(one.numbers for one in own) - routed,
        routed=routed,
        mtp=sum(one.numbers for one in held) - sum(one.numbers for one in own),
        biases=biased * (config.num_moe_experts or 0),
    )


def chunks(shape: Shape, parallel: ParallelSection) -> list[list[Stage]]:
    """What each pipeline rank holds, virtual stage by virtual stage. [rank][virtual stage]"""
    ranks, parts = parallel.pipeline, parallel.virtual_pipeline
    flat = parallel.model_copy(update={"pipeline": ranks * parts, "virtual_pipeline": 1})
    order = stages(shape.config, flat)
    return [[order[part * ranks + rank] for part in range(parts)] for rank in range(ranks)]


def tensors(shape: Shape, parallel: ParallelSection, chunk: Stage) -> Iterator[Tensor]:
    """Parameters of one virtual stage, as `named_parameters` gives them."""
    config, hidden = shape.config, shape.config.hidden_size
    rows = shape.vocab_size * hidden // parallel.tensor
    both_ends = chunk.embedding and chunk.head and parallel.pipeline == 1
    copied = parallel.pipeline > 1 and not both_ends and (shape.tied or bool(config.mtp_num_layers))
    if chunk.embedding:
        yield Tensor("embedding.word_embeddings.weight", rows, alone=copied)
    kinds = sparse_layers(config)
    for number in chunk.layers:
        yield from _layer(config, parallel, kinds[number], f"decoder.layers.{number}")
    # With MTP the trunk's last norm stands behind its last layer, without behind the last stage's.
    if config.num_layers - 1 in chunk.layers if config.mtp_num_layers else chunk.head:
        yield from _norm(config, "decoder.final_layernorm", hidden)
    for number in range(chunk.mtp):
        yield from _mtp(config, parallel, kinds[-1], f"mtp.layers.{number}")
    if chunk.head and shape.outputs == 1:
        yield Tensor("output_layer.weight", hidden)
    elif chunk.head and not (shape.tied and chunk.embedding):
        yield Tensor("output_layer.weight", rows, alone=copied and shape.tied)


def _mtp(config: TransformerConfig, parallel: ParallelSection, sparse: bool, name: str) -> Iterator[Tensor]:
    hidden = config.hidden_size
    yield from _norm(config, f"{name}.enorm", hidden)
    yield from _norm(config, f"{name}.hnorm", hidden)
    yield Tensor(f"{name}.eh_proj.weight", 2 * hidden**2 // parallel.tensor)
    yield from _layer(config, parallel, sparse, f"{name}.transformer_layer")
    yield from _norm(config, f"{name}.final_layernorm", hidden)


def _layer(config: TransformerConfig, parallel: ParallelSection, sparse: bool, name: str) -> Iterator[Tensor]:
    yield from _norm(config, f"{name}.input_layernorm", config.hidden_size)
    yield from _attention(config, parallel.tensor, f"{name}.self_attention")
    yield from _norm(config, f"{name}.pre_mlp_layernorm", config.hidden_size)
    if not sparse:
        yield from _mlp(config, config.ffn_hidden_size, parallel.tensor, f"{name}.mlp")
        return
    experts = config.num_moe_experts or 0
    yield Tensor(f"{name}.mlp.router.weight", experts * config.hidden_size)
    for number in range(experts // parallel.expert):
        place = f"{name}.mlp.experts.local_experts.{number}"
        for part in _mlp(config, config.moe_ffn_hidden_size or 0, parallel.expert_tensor, place):
            yield Tensor(part.name, part.numbers, routed=True)
    if shared := config.moe_shared_expert_intermediate_size:
        yield from _mlp(config, shared, parallel.tensor, f"{name}.mlp.shared_experts")


def _attention(config: TransformerConfig, tensor: int, name: str) -> Iterator[Tensor]:
    width = head_sizes(config)[0]
    for matrix, numbers in attention_weights(config).items():
        yield Tensor(f"{name}.{matrix}.weight", numbers // tensor)
        if matrix == "linear_qkv" and config.add_qkv_bias:
            groups = config.num_query_groups or config.num_attention_heads
            yield Tensor(f"{name}.{matrix}.bias", (config.num_attention_heads + 2 * groups) * width // tensor)
    if config.multi_latent_attention:
        if config.q_lora_rank:
            yield from _norm(config, f"{name}.q_layernorm", config.q_lora_rank)
        yield from _norm(config, f"{name}.kv_layernorm", config.kv_lora_rank)
    elif config.qk_layernorm:
        yield from _norm(config, f"{name}.q_layernorm", width)
        yield from _norm(config, f"{name}.k_layernorm", width)


def _mlp(config: TransformerConfig, width: int, ranks: int, name: str) -> Iterator[Tensor]:
    down = width * config.hidden_size
    yield Tensor(f"{name}.linear_fc1.weight", (mlp_weights(config, width) - down) // ranks)
    yield Tensor(f"{name}.linear_fc2.weight", down // ranks)


def _norm(config: TransformerConfig, name: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", width)
    if config.normalization == "LayerNorm":
        yield Tensor(f"{name}.bias", width)
