"""Tiny mixtures of experts with random weights, made by transformers."""

from pathlib import Path
from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.model.dense_models import SHAPE, write_model

V2_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}
V3_YARN = V2_YARN | {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LATENT_ATTENTION = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 14,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
}
V2 = LATENT_ATTENTION | EXPERTS | {"scoring_func": "softmax", "topk_method": "greedy", "rope_parameters": V2_YARN}
V3 = (
    LATENT_ATTENTION
    | EXPERTS
    | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0,
    }
)
GROUPED = {"q_lora_rank": 18, "routed_scaling_factor": 2.5, "n_group": 4}
QWEN3 = {"head_dim": 20, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
MOE_MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "deepseek_v2_lite": (DeepseekV2Config, DeepseekV2ForCausalLM, V2),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        V2 | GROUPED | {"topk_method": "group_limited_greedy", "topk_group": 2, "routed_scaling_factor": 16.0},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        V3 | GROUPED | {"topk_group": 2, "num_experts_per_tok": 4, "rope_parameters": V3_YARN},
    ),
    "moonlight": (DeepseekV3Config, DeepseekV3ForCausalLM, V3),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, QWEN3 | {"norm_topk_prob": True}),
    "qwen3_moe_unnormalised": (Qwen3MoeConfig, Qwen3MoeForCausalLM, QWEN3 | {"norm_topk_prob": False}),
    "qwen3_moe_some_dense": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        QWEN3 | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": True},
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Name -> the classes, and what differs from `SHAPE`."""


def write_moe(folder: Path, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Save the model to a Hugging Face folder."""
    config, model_class, own = MOE_MODELS[name]
    return write_model(folder, model_class, config(**{**SHAPE, **own, **changes}), seed)
