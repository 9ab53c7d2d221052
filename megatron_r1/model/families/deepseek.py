"""What DeepSeek-V2 and V3 share: multi-latent attention, first layers dense, then shared and routed experts.

DeepSeek-V2 (arXiv 2405.04434) section 2, DeepSeek-V3 (arXiv 2412.19437) section 2. The two differ in how a router
scores and chooses experts, and in multi-token prediction.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.experts import expert_rules, experts_config
from megatron_r1.model.family import HFConfig, Rule, gated_mlp, plain_modules, refuse_other, require


def deepseek_config(hf: HFConfig, section: ModelSection, **family: Any) -> MLATransformerConfig:
    """Megatron's config of a DeepSeek-V2 or V3 shaped model.

    The latents are normalised with `rms_norm_eps`, as vLLM does; transformers takes 1e-6 there whatever it is.

    Args:
        hf: its `config.json`.
        section: the run's [model].
        family: its router, and what else sets the family apart.

    Raises:
        DataError: a key is missing, or has a value that Megatron's modules do not implement.
    """
    require(hf, "hidden_act", "silu")
    refuse_other(hf, attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False, moe_layer_freq=1)
    layers, dense = require(hf, "num_hidden_layers"), require(hf, "first_k_dense_replace")
    width = require(hf, "moe_intermediate_size")
    experts = experts_config(
        section,
        count=require(hf, "n_routed_experts"),
        top_k=require(hf, "num_experts_per_tok"),
        width=width,
        sparse=[layer >= dense for layer in range(layers)],
    )
    return MLATransformerConfig(
        num_layers=layers,
        hidden_size=require(hf, "hidden_size"),
        ffn_hidden_size=require(hf, "intermediate_size"),
        num_attention_heads=require(hf, "num_attention_heads"),
        normalization="RMSNorm",
        layernorm_epsilon=require(hf, "rms_norm_eps"),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=section.init_std,
        moe_shared_expert_intermediate_size=width * require(hf, "n_shared_experts"),
        moe_router_topk_scaling_factor=require(hf, "routed_scaling_factor"),
        **_attention(hf),
        **experts,
        **family,
        **plain_modules(section),
    )


def _attention(hf: HFConfig) -> dict[str, Any]:
    """Multi-latent attention (DeepSeek-V2 2.1) with plain or YaRN-scaled positions (arXiv 2309.00071).

    transformers 5 writes `rope_parameters`; released checkpoints have `rope_theta` and `rope_scaling`.
    """
    refuse_other(hf, rope_interleave=True)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    values = {
        "multi_latent_attention": True,
        "q_lora_rank": require(hf, "q_lora_rank"),
        "kv_lora_rank": require(hf, "kv_lora_rank"),
        "qk_head_dim": require(hf, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": require(hf, "qk_rope_head_dim"),
        "v_head_dim": require(hf, "v_head_dim"),
        "kv_channels": hf["v_head_dim"],
        "qk_layernorm": True,
        "rotary_base": require({**hf, **rope}, "rope_theta"),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if require({"rope_type": kind}, "rope_type", "default", "yarn") == "default":
        return values | {"rope_type": "rope"}
    refuse_other(rope, attention_factor=None, truncate=True)
    return values | {
        "rope_type": "yarn",
        "rotary_scaling_factor": require(rope, "factor"),
        "original_max_position_embeddings": require(rope, "original_max_position_embeddings"),
        "beta_fast": rope.get("beta_fast", 32),
        "beta_slow": rope.get("beta_slow", 1),
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0),
    }


def layer_rules(hf: HFConfig, ours: str, layer: int, *, selection_bias: bool) -> Iterator[Rule]:
    """One layer; `ours` is the prefix of Megatron's, `layer` the number of Hugging Face's."""
    theirs = f"model.layers.{layer}"
    compressed_queries = {
        "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
        "self_attention.q_layernorm": "self_attn.q_a_layernorm",
        "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    }
    queries = {"self_attention.linear_q_proj": "self_attn.q_proj"}
    pairs = {
        "input_layernorm": "input_layernorm",
        **(queries if hf["q_lora_rank"] is None else compressed_queries),
        "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
        "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
        "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
        "self_attention.linear_proj": "self_attn.o_proj",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    for megatron, name in pairs.items():
        yield Rule(f"{ours}.{megatron}.weight", (f"{theirs}.{name}.weight",))
    if layer < hf["first_k_dense_replace"]:
        yield from gated_mlp(f"{ours}.mlp", f"{theirs}.mlp")
        return
    yield from expert_rules(f"{ours}.mlp", f"{theirs}.mlp", hf["n_routed_experts"])
    if selection_bias:
        yield Rule(f"{ours}.mlp.router.expert_bias", (f"{theirs}.mlp.gate.e_score_correction_bias",), float32=True)
    yield from gated_mlp(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts")
