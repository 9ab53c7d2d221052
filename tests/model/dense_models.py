"""Tiny Llama, Qwen2 and Qwen3 models with random weights, made by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 120,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 12}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"head_dim": 12, "tie_word_embeddings": True}),
    "llama_scaled": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 20}),
    "qwen3_tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 20, "tie_word_embeddings": True}),
}
"""Name -> the classes, and what differs from `SHAPE`."""


def write_dense(folder: Path, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Save the model to a Hugging Face folder."""
    config, model_class, own = MODELS[name]
    return write_model(folder, model_class, config(**{**SHAPE, **own, **changes}), seed)


def write_model(
    folder: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """Save a model with random weights; norms and biases are random too, so that none can be mistaken."""
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                spread = 0.1 if name.endswith("e_score_correction_bias") else 0.3
                tensor.add_(spread * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model.eval()
