"""Checkpoints that nobody trained, small or of true shapes, and what the standard reader finds in one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_r1.model.family import HFConfig
from tools import header_checkpoint

ROOT = Path(__file__).parents[2]
V3 = Path(__file__).with_name("deepseek_v3.json")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def tiny(**changes: Any) -> HFConfig:
    """The `config.json` of the smallest DeepSeek-V3: dense and expert layers, an MTP layer; bfloat16."""
    hf = json.loads((ROOT / "examples/r1_tiny/model/config.json").read_text())
    return hf | {"torch_dtype": "bfloat16"} | changes


def write(folder: Path, hf: HFConfig | None = None) -> Path:
    """Pseudo-random weights, FP8 where the config has a `quantization_config`."""
    header_checkpoint.make(hf or tiny(), folder, filled=True)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder's files, by safetensors' own reader."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and bits."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == value.dtype and torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8))
        for name, value in theirs.items()
    )


def contents(folder: Path, *left_out: str) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
