"""A Hugging Face model folder: `config.json` and safetensors, read lazily and written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_r1.errors import DataError
from megatron_r1.model.family import HFConfig

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a model folder that training does not change."""


def read_config(folder: Path) -> HFConfig:
    """The folder's `config.json`.

    Raises:
        DataError: missing, not JSON, or without an architecture.
    """
    path = folder / "config.json"
    try:
        config: HFConfig = json.loads(path.read_text())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; a model folder needs a Hugging Face config.json"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise DataError(f"{path} names no architecture (key 'architectures')")
    return config


class TensorReader:
    """The safetensors of a folder as one lazy dictionary."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DataError(f"{folder} holds no .safetensors file; set model.load_weights = false to start at random")
        self._where: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    self._where.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise DataError(f"{path} is not a readable safetensors file: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def write(folder: Path, config: HFConfig, tensors: Iterable[tuple[str, torch.Tensor]], *sources: Path) -> None:
    """Write a model folder aside, then rename it into place; an older one of that name is replaced.

    Args:
        folder: where it will stand.
        config: its `config.json`.
        tensors: Hugging Face names and values.
        sources: folders whose tokenizer and generation settings are copied beside the weights; the first that has
            a file gives it.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    values = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}
    save_file(values, aside / "model.safetensors", metadata={"format": "pt"})
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS:
        if found := next((source / name for source in sources if (source / name).exists()), None):
            shutil.copy2(found, aside / name)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed right here
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
