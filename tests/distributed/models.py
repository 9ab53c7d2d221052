"""The model folders that every layout starts from: small, random, with sizes that split by two and by four.

Weights are large enough that logits spread and experts differ, so that a wrong sum shows; norms and selection biases
are random too, so that none can be mistaken for another.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.convert.invented import tiny
from tests.model.dense_models import SHAPE
from tools.header_checkpoint import Invented

VOCABULARY = 400
DENSE = {
    **SHAPE,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": tiny(torch_dtype="float32", num_hidden_layers=4, vocab_size=VOCABULARY),
    "tied": {**DENSE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
}
"""DeepSeek-V3 in miniature: one dense layer, three of experts in groups, multi-token prediction. And a Llama, whose
first and last pipeline stage hold the same matrix."""


def write_all(root: Path) -> None:
    """`root/<name>` for every config, and `root/reward`, a reward model with the trunk of `v3`."""
    for name, hf in CONFIGS.items():
        _write(root / name, hf, random_tensors(hf, root / name))
    hf = CONFIGS["v3"] | {"num_nextn_predict_layers": 0}
    trunk = random_tensors(hf, root / "reward")
    del trunk["lm_head.weight"]
    score = torch.randn(1, hf["hidden_size"], generator=torch.Generator().manual_seed(1))
    classifier = {"architectures": ["DeepseekV3ForSequenceClassification"], "num_labels": 1}
    _write(root / "reward", hf | classifier, trunk | {"score.weight": score})


def random_tensors(hf: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """A value for every tensor of a model, the same for the same config."""
    shapes, generator = Invented(hf, folder), torch.Generator().manual_seed(0)
    names = [name for rule in shapes.rules for name in rule.hf]
    return {name: _value(name, shapes.spec(name).shape, generator) for name in names}


def _value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.05 * noise
    return 1 + 0.2 * noise if len(shape) == 1 else 0.12 * noise


def _write(folder: Path, hf: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "model.safetensors")
