"""Weights as the trainer has written them: one safetensors file, or a folder of several with Hugging Face's index."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_r1.rollout.checksum import KEY, VERSION, checksum, checksum_of_all

INDEX = "model.safetensors.index.json"
"""As transformers calls it (`model/shards.py`)."""


def read(path: str, received: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one at a time; their checksums go to `received`.

    Those of a folder come in the order of its index, layer by layer, whatever files they are in: an engine is done with
    a layer when it has all of it.

    Raises:
        ValueError: a tensor is not what the trainer wrote, or one of all is not there, as the metadata tell.
    """
    index = _index(path)
    listed: dict[str, str] = index.get("weight_map", {})
    with ExitStack() as stack:
        files = [Path(path, file) for file in sorted(set(listed.values()))] if index else [Path(path)]
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        holding = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        sent: dict[str, str] = {}
        for file in opened:
            sent |= json.loads((file.metadata() or {}).get(KEY, "{}"))
        if missing := listed.keys() - holding:
            raise ValueError(f"{path} has no {min(missing)}, which its index names ({len(missing)} such tensors)")
        for name in listed or holding:
            tensor = holding[name].get_tensor(name)
            received[name] = checksum(tensor)
            if received[name] != sent.get(name, received[name]):
                raise ValueError(f"{name} in {path} has checksum {received[name]}, but {sent[name]} was sent")
            yield name, tensor
    every = checksum_of_all({name: received[name] for name in holding})
    if every != (whole := index.get("metadata", {}).get(KEY, every)):
        raise ValueError(f"the tensors in {path} have together checksum {every}, but {whole} was sent")


def version_of(path: str) -> str:
    """Which weights a file or folder says that it holds."""
    if index := _index(path):
        said = index.get("metadata", {})
    else:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    return str(said.get(VERSION, "of no version"))


def _index(path: str) -> dict[str, Any]:
    """Of a folder; nothing for a file."""
    return dict(json.loads(Path(path, INDEX).read_text())) if Path(path).is_dir() else {}
