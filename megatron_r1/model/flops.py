"""Floating-point operations of a model, part by part: what MFU is measured against, and what a layout is planned with.

Counted are the matrix products that the model's mathematics needs, two operations for each multiplication with its
addition: projections, scores and weighted values of attention, experts, router, heads. Not counted are embedding
look-ups, norms, rotations, softmax, activation functions, and whatever an implementation does on top: recomputation,
the masked half of attention, padding. A causal sequence of n tokens counts as n^2 / 2 pairs of query and key, as in
Megatron-LM and FlashAttention (arXiv 2307.08691); PaLM's MFU (arXiv 2204.02311, appendix B) counts n^2. A backward pass
is two forward passes: the gradients of both factors of each product.

In this convention training DeepSeek-V3 takes 260.64 GFLOP a token at 4,096 tokens with its MTP layer, 250.45 without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.kernels import KernelsSection
from megatron_r1.config.sections import ModelSection
from megatron_r1.model.family import Family, HFConfig
from megatron_r1.model.scalar_head import as_classifier, causal_architecture, is_classifier
from megatron_r1.registry import resolve

BACKWARD_AND_FORWARD = 3
"""A training step in forward passes."""
EVERYTHING = ModelSection(path=Path(), load_weights=False, mtp_loss_coef=1.0)


@dataclass(frozen=True)
class Flops:
    """Operations by part; those of the MTP layers, their heads included, are all in `mtp`."""

    attention_projections: float = 0.0
    attention_scores: float = 0.0
    """Queries with keys, and probabilities with values."""
    dense_mlp: float = 0.0
    routed_experts: float = 0.0
    shared_experts: float = 0.0
    router: float = 0.0
    head: float = 0.0
    mtp: float = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(getattr(self, part.name) * factor for part in fields(self)))


def flops_per_token(hf: HFConfig, length: int) -> Flops:
    """Of a training step of the model that a `config.json` describes, its MTP layers included.

    Args:
        hf: its `config.json`.
        length: tokens of each sequence.

    Raises:
        ConfigError: unsupported architecture.
        DataError: unsupported value.
    """
    return training_flops(whole_config(hf), output_rows(hf), [length]) * (1 / length)


def whole_config(hf: HFConfig, section: ModelSection = EVERYTHING) -> TransformerConfig:
    """Megatron's config of the whole model. Raises what `flops_per_token` does.

    Args:
        hf: its `config.json`.
        section: how it is trained; by default all of it, MTP layers included, in bfloat16.
    """
    family: type[Family] = resolve("family", causal_architecture(hf))
    # Whatever it is computed with: a plan is made where there is none of it.
    plain = KernelsSection(layers="local", grouped_gemm="moe_act" in section.memory.recompute_modules)
    section = section.model_copy(update={"kernels": plain, "fp8": None})
    return family.transformer_config(as_classifier(hf) if is_classifier(hf) else hf, section)


def output_rows(hf: HFConfig) -> int:
    """Rows of the output layer: the vocabulary's, or the one of a scalar head."""
    return 1 if is_classifier(hf) else int(hf["vocab_size"])


def forward_flops(config: TransformerConfig, outputs: int, lengths: Sequence[int]) -> Flops:
    """One forward pass over sequences, alone in a row each or packed: only their lengths count.

    Args:
        config: the whole model's, whatever part of it this process holds. Its MTP layers count where it has them.
        outputs: rows of the output layer (`output_rows`).
        lengths: tokens of each sequence.
    """
    tokens, pairs = sum(lengths), sum(length**2 / 2 for length in lengths)
    layers = [_layer(config, sparse, tokens, pairs) for sparse in sparse_layers(config)]
    head = 2 * tokens * outputs * config.hidden_size
    trunk = sum(layers, Flops(head=head))
    if not config.mtp_num_layers:
        return trunk
    joined = 2 * tokens * 2 * config.hidden_size**2  # eh_proj: embedding and hidden state to one hidden state
    return trunk + Flops(mtp=config.mtp_num_layers * (joined + layers[-1].total + head))


def training_flops(config: TransformerConfig, outputs: int, lengths: Sequence[int]) -> Flops:
    """Forward and backward pass over sequences, when all weights are trained (of LoRA it is 2/3, and the adapters)."""
    return forward_flops(config, outputs, lengths) * BACKWARD_AND_FORWARD


def sparse_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the trunk, whether it has experts."""
    if not config.num_moe_experts:
        return [False] * config.num_layers
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):  # every so many layers one, from the first on
        return [layer % pattern == 0 for layer in range(config.num_layers)]
    return [bool(sparse) for sparse in pattern]


def attention_weights(config: TransformerConfig) -> dict[str, int]:
    """Numbers in each matrix of a layer's attention, under Megatron's names of them."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query, value = head_sizes(config)
    output = {"linear_proj": heads * value * hidden}
    if not config.multi_latent_attention:
        groups = config.num_query_groups or heads
        return output | {"linear_qkv": hidden * (heads * query + groups * (query + value))}
    rank, latent, rotated = config.q_lora_rank, config.kv_lora_rank, config.qk_pos_emb_head_dim
    queries = {"linear_q_proj": hidden * heads * query}
    compressed = {"linear_q_down_proj": hidden * (rank or 0), "linear_q_up_proj": (rank or 0) * heads * query}
    keys_values = {
        "linear_kv_down_proj": hidden * (latent + rotated),
        "linear_kv_up_proj": latent * heads * (config.qk_head_dim + value),
    }
    return output | (queries if rank is None else compressed) | keys_values


def head_sizes(config: TransformerConfig) -> tuple[int, int]:
    """Numbers in one head's query (and key), and in its value."""
    if config.multi_latent_attention:
        return config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
    return config.kv_channels, config.kv_channels


def mlp_weights(config: TransformerConfig, width: int) -> int:
    """Numbers in the matrices of an MLP with so many hidden units, a gate among them where the model has one."""
    return (3 if config.gated_linear_unit else 2) * config.hidden_size * width


def _layer(config: TransformerConfig, sparse: bool, tokens: int, pairs: float) -> Flops:
    projections = 2 * tokens * sum(attention_weights(config).values())
    scores = 2 * pairs * config.num_attention_heads * sum(head_sizes(config))
    attention = Flops(attention_projections=projections, attention_scores=scores)
    if not sparse:
        return attention + Flops(dense_mlp=2 * tokens * mlp_weights(config, config.ffn_hidden_size))
    experts = config.moe_router_topk * mlp_weights(config, config.moe_ffn_hidden_size)
    shared = mlp_weights(config, config.moe_shared_expert_intermediate_size or 0)
    return attention + Flops(
        routed_experts=2 * tokens * experts,
        shared_experts=2 * tokens * shared,
        router=2 * tokens * config.hidden_size * config.num_moe_experts,
    )
