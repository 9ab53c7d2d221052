"""Quantised checkpoints for tests: a tokenizer, a model that has learned something, and what was written read back."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from megatron_r1.config.modelopt import QuantizeConfig
from megatron_r1.convert import modelopt
from megatron_r1.model.safetensors_file import read, read_header
from tests.model.dense_models import MODELS, SHAPE

installed = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed (requirements/modelopt.lock)"
)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The values of NVFP4's three bits below the sign (OCP Microscaling specification 1.0, table 5.3.3)."""
SUMS = [f"{a}+{b}={(a + b) % 10}" for a in range(10) for b in range(10)]
LARGER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def token_ids(text: str) -> list[int]:
    """As `write_tokenizer` numbers characters, between begin and end of sequence."""
    return [1, *(3 + ord(character) - 32 for character in text), 2]


IDS = [token_ids(text) for text in SUMS]


def write_tokenizer(folder: Path) -> None:
    """Characters as tokens, bos 1 and eos 2 as the tiny models have them."""
    pieces = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127))]
    fast = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)


def expanded(stored: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """float32 values of a quantised linear layer, by its tensors' dtypes."""
    weight, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"].float()
    if weight.dtype is torch.float8_e4m3fn:
        if scale.numel() > 1:
            scale = scale.view(scale.shape[0], -1).repeat_interleave(128, 0).repeat_interleave(128, 1)
            scale = scale[: weight.shape[0], : weight.shape[1]]
        return weight.float() * scale
    if second := stored.get(f"{module}.weight_scale_2"):
        bits = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).int()
        values = E2M1[bits & 7] * torch.where(bits > 7, -1, 1)
        return values * (scale * second).repeat_interleave(16, 1)
    nibbles = torch.stack([weight & 15, weight >> 4], dim=1).flatten(0, 1).int()
    values = torch.where(nibbles > 7, nibbles - 16, nibbles).float() * scale.repeat_interleave(128, 1)
    return values * stored.get(f"{module}.pre_quant_scale", torch.ones(())).float()


def accuracy(model: PreTrainedModel) -> float:
    """Share of the sums whose last digit is the likeliest token."""
    tokens = torch.tensor(IDS)
    with torch.no_grad():
        found = model(tokens[:, :-2]).logits[:, -1].argmax(-1)
    return float((found == tokens[:, -2]).float().mean())


def train(root: Path) -> Path:
    """`hf`: a Llama that has learned to add modulo 10; `text.jsonl`: its sums."""
    torch.manual_seed(0)
    values = {**SHAPE, **MODELS["llama"][2], **LARGER, "head_dim": 16, "initializer_range": 0.1}
    model, tokens = LlamaForCausalLM(LlamaConfig(**values)), torch.tensor(IDS)
    for layer in model.model.layers:  # a unit that does nothing and gets no gradient, see `hostile`
        layer.mlp.gate_proj.weight.data[0] = layer.mlp.up_proj.weight.data[0] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().bfloat16().save_pretrained(root / "hf")
    write_tokenizer(root / "hf")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SUMS))
    assert accuracy(model.float()) == 1
    return root


def quantize(root: Path, name: str, form: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    texts = {"calibration": root / "text.jsonl", "heldout": root / "text.jsonl"}
    values = {"source": root / "hf", "output": root / name, "format": form, **texts, **changes}
    return root / name, modelopt.run_quantize(QuantizeConfig(**values))


def served(root: Path, output: Path) -> PreTrainedModel:
    """The written model in float32, its weights expanded; FP8 activations are rounded with the written scale."""
    stored = {name: read(entry) for name, entry in read_header(output / "model.safetensors").items()}
    model = LlamaForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        quantised = f"{name}.weight_scale" in stored
        value = expanded(stored, name) if quantised else stored[f"{name}.weight"].float()
        module.weight.data.copy_(value)
        if quantised and stored[f"{name}.weight"].dtype is torch.float8_e4m3fn:
            module.register_forward_pre_hook(rounded(stored[f"{name}.input_scale"].float()))
    kept = {name: tensor.float() for name, tensor in stored.items() if name in dict(model.named_parameters())}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "embed" in name:
                parameter.copy_(kept[name])
    return model.eval()


def rounded(scale: torch.Tensor) -> Any:
    def hook(_: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return (args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return hook
