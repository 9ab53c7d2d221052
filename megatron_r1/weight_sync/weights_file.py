"""Weights as a safetensors file with a checksum of each tensor, for engines to load."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_r1.model.safetensors_file import Spec, Writer
from megatron_r1.rollout.checksum import KEY, VERSION, checksum


def on_host(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tensors by name, in host memory; those that are there already are not copied."""
    return {name: tensor.detach().cpu() for name, tensor in named_tensors}


def size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write(path: Path, tensors: Mapping[str, torch.Tensor], version: int) -> dict[str, str]:
    """Write the file.

    Args:
        path: where.
        tensors: under their Hugging Face names.
        version: of the weights.

    Returns:
        The checksums.

    Raises:
        DataError: it cannot be written.
    """
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    with Writer(path, specs, {KEY: json.dumps(sums), VERSION: str(version)}) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)
    return sums
