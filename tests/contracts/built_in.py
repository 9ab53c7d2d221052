"""A section for every built-in task, reward and tool, with keys that have no default; a tiny model for every family."""

from pathlib import Path
from typing import Any

from tests.contracts.endpoints import ADDRESS

DATA = Path(__file__).parent / "data"

REWARDS: list[dict[str, Any]] = [
    {"type": "accuracy"},
    {"type": "code"},
    {"type": "code_format"},
    {"type": "cosine"},
    {"type": "equations"},
    {"type": "format"},
    {"type": "language_consistency"},
    {"type": "length"},
    {"type": "model_judge", "url": f"{ADDRESS}/v1", "model": "judge"},
    {"type": "multiple_choice"},
    {"type": "reasoning_steps"},
    {"type": "repetition_penalty"},
    {"type": "reward_model", "url": ADDRESS},
    {"type": "soft_overlong_punishment"},
    {"type": "tag_count"},
    {"type": "task"},
]

TASKS: list[dict[str, Any]] = [
    {"type": "code", "source": str(DATA / "code.jsonl")},
    {"type": "general", "source": str(DATA / "general.jsonl")},
    {"type": "human_eval"},
    {"type": "live_code_bench", "source": str(DATA / "live_code_bench.jsonl")},
    {"type": "logic"},
    {"type": "math", "source": str(DATA / "math.jsonl")},
    {
        "type": "mixture",
        "tasks": {
            "sums": {"type": "reasoning_gym", "dataset": "chain_sum", "weight": 3.0},
            "math": {"type": "math", "source": str(DATA / "math.jsonl"), "weight": 1.0},
        },
    },
    {"type": "reasoning_gym", "dataset": "chain_sum"},
    {"type": "stem", "source": str(DATA / "stem.jsonl")},
]

TOOLS: list[dict[str, Any]] = [{"type": "python"}]

FAMILIES: list[dict[str, Any]] = [
    {"type": "DeepseekV2ForCausalLM", "model": "deepseek_v2_lite"},
    {"type": "DeepseekV3ForCausalLM", "model": "deepseek_v3"},
    {"type": "DeepseekV3ForCausalLM", "model": "moonlight"},
    {"type": "LlamaForCausalLM", "model": "llama_tied"},
    {"type": "MixtralForCausalLM", "model": "mixtral"},
    {"type": "Qwen2ForCausalLM", "model": "qwen2"},
    {"type": "Qwen3ForCausalLM", "model": "qwen3"},
    {"type": "Qwen3MoeForCausalLM", "model": "qwen3_moe"},
]
"""`model` is one of tests/model/dense_models.py or moe_models.py."""
