"""A tiny DeepSeek-V3 with random weights, and the settings of the servers that hold it."""

import json
import socket
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_r1.config.sections import RolloutSection

VOCABULARY = 400


def write_model(folder: Path, seed: int) -> Path:
    """MLA with LoRA ranks, a dense first layer, grouped sigmoid routing, a shared expert, YaRN; random weights."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2,
        num_experts_per_tok=2, routed_scaling_factor=2.5, first_k_dense_replace=1, num_nextn_predict_layers=1,
        max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 128},
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).float()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    file = folder / "config.json"
    # transformers leaves these two out; vLLM would silently route by softmax without the second
    file.write_text(json.dumps(json.loads(file.read_text()) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rollout_section(port: int, **changes: object) -> RolloutSection:
    settings = {"max_model_len": 128, "max_tokens": 40, "max_num_seqs": 256, "kv_cache_gib": 0.1, "threads": 1}
    return RolloutSection.model_validate({"port": port, "start_timeout": 240.0, **settings, **changes})


def decode(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))
