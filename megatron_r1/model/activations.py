"""Bytes that the modules we build save for the backward pass, layer by layer.

In the order of the code: Megatron's local layers without fused kernels (`family.plain_modules`), `layers.Norm` and
`layers.SdpaAttention`. With tensor parallelism sequences are parallel, so that what is not cut by heads or hidden units
is cut by tokens; all of it is then 1 / tensor. Tensors that two modules save are counted once, and routing is taken for
balanced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.model.flops import head_sizes

_FLOAT, _LONG = 4, 8


@dataclass(frozen=True)
class Tokens:
    """A microbatch on one rank."""

    rows: int
    length: int
    """Of a row, on this context-parallel rank."""
    context: int
    """Context-parallel ranks: of how many parts keys and values are gathered."""
    tensor: int
    on_gpu: bool
    """There norms save their input alone, and attention never its probabilities."""

    @property
    def count(self) -> int:
        """Before sequence parallelism."""
        return self.rows * self.length


def layer_bytes(config: TransformerConfig, sparse: bool, tokens: Tokens) -> float:
    """One transformer layer's."""
    if config.recompute_granularity == "full":
        return tokens.count * config.hidden_size * config.params_dtype.itemsize / tokens.tensor
    return whole_layer_bytes(config, sparse, tokens)


def whole_layer_bytes(config: TransformerConfig, sparse: bool, tokens: Tokens) -> float:
    """The same, also where whole layers are recomputed: for as long as one is."""
    again = _recomputed(config)
    hidden, size = config.hidden_size, config.params_dtype.itemsize
    # What the layers behind a norm get from it, and the two norms.
    norms = 2 * (hidden * size if "layernorm" in again else _norm(config, hidden, tokens.on_gpu) + hidden * size)
    each = norms + _attention(config, tokens, again) + (_moe(config, again) if sparse else _dense(config, again))
    positions = 0 if "mla_up_proj" in again else 2 * tokens.length * _rotated(config) * size
    return tokens.count * each / tokens.tensor + positions


def head_bytes(config: TransformerConfig, outputs: int, tokens: Tokens) -> float:
    """Of the last norm and `_output`."""
    norm = _norm(config, config.hidden_size, tokens.on_gpu)
    return tokens.count * (norm + _output(config, outputs)) / tokens.tensor


def mtp_bytes(config: TransformerConfig, sparse: bool, outputs: int, tokens: Tokens) -> float:
    """One MTP layer's, with its own head."""
    joined = 2 * config.hidden_size * config.params_dtype.itemsize
    if config.recompute_granularity == "full":  # all but the head
        return tokens.count * (joined + _output(config, outputs)) / tokens.tensor
    joined += 2 * _norm(config, config.hidden_size, tokens.on_gpu)
    inside = layer_bytes(config, sparse, tokens) + head_bytes(config, outputs, tokens)
    return tokens.count * joined / tokens.tensor + inside


def _output(config: TransformerConfig, outputs: int) -> float:
    """Bytes a token of the output layer's input, and of the cross-entropy's probabilities, which are float32."""
    if outputs == 1:
        return config.hidden_size * (config.params_dtype.itemsize + _FLOAT)  # a scalar head works in float32
    return config.hidden_size * config.params_dtype.itemsize + outputs * _FLOAT


def _recomputed(config: TransformerConfig) -> set[str]:
    return set(config.recompute_modules or ()) if config.recompute_granularity == "selective" else set()


def _norm(config: TransformerConfig, width: int, on_gpu: bool) -> float:
    """Its input and one number a token.

    On a CPU, where torch puts a norm together of other operators, also its result before the weight, both in float32.
    """
    return width * (config.params_dtype.itemsize if on_gpu else 2 * _FLOAT) + _FLOAT


def _attention(config: TransformerConfig, tokens: Tokens, again: set[str]) -> float:
    """Bytes a token between the first norm and the residual: projections, rotation, attention."""
    size, heads = config.params_dtype.itemsize, config.num_attention_heads
    query, value = head_sizes(config)
    latent = config.multi_latent_attention
    groups = heads if latent else config.num_query_groups or heads
    inputs = heads * query + tokens.context * groups * (query + value)
    if latent:
        projected = _latents(config, tokens.on_gpu)
        inputs = 0 if "mla_up_proj" in again else inputs
    else:
        projected = (heads + 2 * groups) * query * size
        if tokens.context == 1:
            inputs -= groups * value  # a view of what is projected
        if config.qk_layernorm:
            projected += _head_norms(config, heads, groups, query, tokens.on_gpu)
    output = heads * value * size
    if "core_attn" in again:
        return projected + inputs * size + output
    if tokens.on_gpu or query == value:
        return projected + inputs * size + output + heads * _FLOAT
    # A CPU has no kernel for values of another size than queries: torch writes it out in float32.
    return projected + (inputs + heads * tokens.length * tokens.context) * _FLOAT + output


def _latents(config: TransformerConfig, on_gpu: bool) -> float:
    """What the norms of multi-latent attention's compressed queries, keys and values save, and what they give."""
    size, rank, latent = config.params_dtype.itemsize, config.q_lora_rank or 0, config.kv_lora_rank
    norms = _norm(config, latent, on_gpu) + (_norm(config, rank, on_gpu) if rank else 0.0)
    # In float32 the norm saves its input itself, which is a view of the latent with the rotated key.
    view = config.qk_pos_emb_head_dim * size if on_gpu or size == _FLOAT else 0
    return norms + (rank + latent) * size + view


def _head_norms(config: TransformerConfig, heads: int, groups: int, width: int, on_gpu: bool) -> float:
    """Norms of each head's query and key."""
    one = _norm(config, width, on_gpu)
    in_place = groups * width * config.params_dtype.itemsize if on_gpu or config.params_dtype.itemsize == _FLOAT else 0
    return (heads + groups) * one - in_place  # keys are a view of what is projected


def _rotated(config: TransformerConfig) -> int:
    """Numbers of a head that are rotated: as many sines and cosines are kept for each position."""
    return config.qk_pos_emb_head_dim if config.multi_latent_attention else config.kv_channels


def _dense(config: TransformerConfig, again: set[str]) -> float:
    return 0.0 if "mlp" in again else _gated(config) * config.ffn_hidden_size * config.params_dtype.itemsize


def _gated(config: TransformerConfig) -> int:
    """Hidden units' tensors of an MLP: gate and up, the activation, up again, the product."""
    return 5 if config.gated_linear_unit else 2


def _moe(config: TransformerConfig, again: set[str]) -> float:
    """Bytes a token of a mixture of experts."""
    if "moe" in again:
        return 0.0
    size, experts, chosen = config.params_dtype.itemsize, config.num_moe_experts, config.moe_router_topk
    # Scores and probabilities; the choice as a mask, again by experts, and its probabilities; indices of the choice.
    router = experts * (2 * _FLOAT + 1 + 1 + _FLOAT) + chosen * (2 * _LONG + _FLOAT)
    # An expert's hidden units once more: the product before and after the token's weight.
    routed = config.hidden_size * size + (_gated(config) + 1) * config.moe_ffn_hidden_size * size + _FLOAT
    shared = _gated(config) * (config.moe_shared_expert_intermediate_size or 0) * size
    return router + chosen * routed + (0.0 if "shared_experts" in again else shared)


def saved_bytes(module: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of what `forward` does, measured; each memory once, parameters and buffers apart.

    Args:
        module: whose parameters and buffers they are.
        forward: calls it, with gradients on.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
