"""DeepSeek-V3 and R1: multi-latent attention, sigmoid-routed experts with a selection bias, multi-token prediction.

Architecture: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 2.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError
from megatron_r1.model.family import HFConfig, Rule, gated_mlp, plain_modules, require


class DeepseekV3:
    """`DeepseekV3ForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> MLATransformerConfig:
        """Megatron's config of a DeepSeek-V3 shaped model.

        Raises:
            DataError: a key is missing, or has a value that Megatron's modules do not implement.
        """
        layers = require(hf, "num_hidden_layers")
        mtp_layers = hf.get("num_nextn_predict_layers", 0) if section.mtp_loss_coef > 0 else 0
        require(hf, "attention_bias", False)
        require(hf, "hidden_act", "silu")
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
            attention_dropout=require(hf, "attention_dropout", 0.0),
            init_method_std=section.init_std,
            mtp_num_layers=mtp_layers or None,
            mtp_loss_scaling_factor=section.mtp_loss_coef,
            **_attention(hf),
            **_experts(hf, section),
            **plain_modules(section),
        )

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Tensor names as in the released checkpoint (DeepSeek-V3 README_WEIGHTS)."""
        layers = hf["num_hidden_layers"]
        mtp = range(hf.get("num_nextn_predict_layers", 0))
        embedding_copies = tuple(f"model.layers.{layers + depth}.embed_tokens.weight" for depth in mtp)
        head_copies = tuple(f"model.layers.{layers + depth}.shared_head.head.weight" for depth in mtp)
        yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), embedding_copies)
        for layer in range(layers):
            yield from _layer(hf, f"decoder.layers.{layer}", layer)
        yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",))
        yield Rule("output_layer.weight", ("lm_head.weight",), head_copies)
        for depth in mtp:
            ours, theirs = f"mtp.layers.{depth}", f"model.layers.{layers + depth}"
            # eh_proj takes [embedding; hidden] in the checkpoint as in Megatron: no columns to exchange.
            for name in ("enorm", "hnorm", "eh_proj"):
                yield Rule(f"{ours}.{name}.weight", (f"{theirs}.{name}.weight",))
            yield from _layer(hf, f"{ours}.transformer_layer", layers + depth)
            yield Rule(f"{ours}.final_layernorm.weight", (f"{theirs}.shared_head.norm.weight",))


def _attention(hf: HFConfig) -> dict[str, Any]:
    """Multi-latent attention with YaRN (DeepSeek-V3 2.1.1 and 4.3)."""
    values = {
        "multi_latent_attention": True,
        "q_lora_rank": require(hf, "q_lora_rank"),
        "kv_lora_rank": require(hf, "kv_lora_rank"),
        "qk_head_dim": require(hf, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": require(hf, "qk_rope_head_dim"),
        "v_head_dim": require(hf, "v_head_dim"),
        "kv_channels": hf["v_head_dim"],
        "qk_layernorm": True,
        "rotary_base": require(hf, "rope_theta"),
    }
    yarn = hf.get("rope_scaling")
    if yarn is None:
        return values | {"rope_type": "rope"}
    require(yarn, "type" if "type" in yarn else "rope_type", "yarn")
    return values | {
        "rope_type": "yarn",
        "rotary_scaling_factor": require(yarn, "factor"),
        "original_max_position_embeddings": require(yarn, "original_max_position_embeddings"),
        "beta_fast": yarn.get("beta_fast", 32),
        "beta_slow": yarn.get("beta_slow", 1),
        "mscale": yarn.get("mscale", 1.0),
        "mscale_all_dim": yarn.get("mscale_all_dim", 0.0),
    }


def _experts(hf: HFConfig, section: ModelSection) -> dict[str, Any]:
    """Node-limited routing with auxiliary-loss-free balancing (DeepSeek-V3 2.1.2)."""
    require(hf, "scoring_func", "sigmoid")
    require(hf, "topk_method", "noaux_tc")
    require(hf, "norm_topk_prob", True)
    require(hf, "moe_layer_freq", 1)
    groups, chosen_groups, top_k = (require(hf, key) for key in ("n_group", "topk_group", "num_experts_per_tok"))
    if chosen_groups < groups and top_k != 2 * chosen_groups:
        # Megatron ranks groups by their best top_k / topk_group experts (the paper's K_r / M), the published
        # inference code and transformers by their best 2: the same only here.
        raise DataError(
            f"config.json: num_experts_per_tok {top_k} must be 2 x topk_group {chosen_groups} when only some of the "
            f"{groups} groups are chosen: otherwise trainer and engine route differently"
        )
    width, dense = require(hf, "moe_intermediate_size"), require(hf, "first_k_dense_replace")
    layers = hf["num_hidden_layers"]
    return {
        "num_moe_experts": require(hf, "n_routed_experts"),
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * require(hf, "n_shared_experts"),
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": section.bias_update_rate,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": chosen_groups,
        "moe_router_topk_scaling_factor": require(hf, "routed_scaling_factor"),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if section.balance_loss_coef else "none",
        "moe_aux_loss_coeff": section.balance_loss_coef,
        "moe_grouped_gemm": False,
    }


def _layer(hf: HFConfig, ours: str, layer: int) -> Iterator[Rule]:
    theirs = f"model.layers.{layer}"
    pairs = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
        "self_attention.q_layernorm": "self_attn.q_a_layernorm",
        "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
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
    yield Rule(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",))
    yield Rule(f"{ours}.mlp.router.expert_bias", (f"{theirs}.mlp.gate.e_score_correction_bias",), float32=True)
    for expert in range(hf["n_routed_experts"]):
        yield from gated_mlp(f"{ours}.mlp.experts.local_experts.{expert}", f"{theirs}.mlp.experts.{expert}")
    yield from gated_mlp(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts")
