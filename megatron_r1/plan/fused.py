"""Activations that Transformer Engine's layers keep: fused norms, attention and activation functions.

After the table that NVIDIA's examples of mixtures of experts print for DeepSeek-V3: 2,236 MiB in a sparse layer at
4,096 tokens.
"""

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.model.activations import Tokens
from megatron_r1.model.flops import head_sizes

_FLOAT, _LONG = 4, 8


def fused_parts(config: TransformerConfig, sparse: bool) -> dict[str, float]:
    """Bytes a token by part, before sequence parallelism, nothing being computed again."""
    size, hidden, heads = config.params_dtype.itemsize, config.hidden_size, config.num_attention_heads
    query, value = head_sizes(config)
    parts: dict[str, float] = {"input": hidden * size, "norm": hidden * size}
    if config.multi_latent_attention:
        rank, latent = config.q_lora_rank or 0, config.kv_lora_rank
        parts |= {"latents": 2 * (rank + latent) * size, "queries": heads * query * size}
        parts |= {"keys": heads * query * size, "values": heads * value * size}
    else:
        groups = config.num_query_groups or heads
        parts |= {"queries": heads * query * size, "keys": groups * query * size, "values": groups * value * size}
    parts |= {"attention": heads * value * size, "sums": heads * _FLOAT, "residual": hidden * size}
    parts["second norm"] = hidden * size
    if not sparse:
        return parts | {"hidden units": 2 * config.ffn_hidden_size * size, "activation": config.ffn_hidden_size * size}
    experts, chosen, width = config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size
    shared = config.moe_shared_expert_intermediate_size or 0
    return parts | {
        "router": experts * size,
        "maps": experts * _LONG,
        "shared hidden units": 2 * shared * size,
        "shared activation": shared * size,
        "permuted": chosen * hidden * size,
        "hidden units": 2 * chosen * width * size,
        "activation": chosen * width * size,
        "returned": chosen * hidden * size,
    }


_AGAIN = {
    "layernorm": {"norm", "second norm"},
    "mla_up_proj": {"queries", "keys", "values"},
    "core_attn": {"sums"},
    "moe_act": {"activation"},
    "shared_experts": {"shared hidden units", "shared activation"},
    "moe": {
        "router", "maps", "shared hidden units", "shared activation", "permuted", "hidden units", "activation",
        "returned",
    },
}  # fmt: skip
"""What is not kept when a module is computed again."""


def fused_layer_bytes(config: TransformerConfig, sparse: bool, tokens: Tokens) -> float:
    """One layer's on one rank. With sequence parallelism the shared experts' input is gathered on every rank."""
    parts = fused_parts(config, sparse)
    if config.recompute_granularity == "full":
        parts = {"input": parts["input"]}
    elif config.recompute_granularity == "selective":
        modules = config.recompute_modules or []
        dropped = set().union(*(_AGAIN.get(module, set()) for module in modules))
        if "mlp" in modules and not sparse:
            dropped |= {"hidden units", "activation"}
        parts = {name: number for name, number in parts.items() if name not in dropped}
    whole = parts.pop("second norm", 0.0) if sparse and config.moe_shared_expert_intermediate_size else 0.0
    return tokens.count * (sum(parts.values()) / tokens.tensor + whole)
