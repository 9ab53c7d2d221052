"""What tells whether the weights that an engine reads are those that the trainer wrote."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash

KEY = "xxh3_64"
"""Of a safetensors file's metadata: name of each tensor -> its checksum, as JSON."""
VERSION = "version"
"""Of the same metadata: which weights they are."""
BLOCK = 1 << 12
BLOCKS = 16
"""So many blocks of a tensor count, from its first byte to its last."""
WHOLE = 1 << 17
"""Of a tensor of so many bytes, or fewer, every one counts."""
SAMPLED = 32
"""Tensors of a push that are compared where comparing all would bring them back from GPUs."""


def checksum(tensor: torch.Tensor) -> str:
    """XXH3 of dtype, shape and content of a tensor.

    Of a large tensor blocks at equal distances stand for all of it: a transport goes wrong by a tensor, a bucket or a
    page, and reading everything again on both sides would cost as much as sending it.
    """
    hasher = _begun(tensor)
    for part in _parts(tensor.detach().contiguous()):
        hasher.update(part.contiguous().cpu().numpy())
    return hasher.hexdigest()


class Summed:
    """A tensor in host memory whose content changes: what has to be found out for its checksum is found out once.

    Args:
        tensor: contiguous.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._begun = _begun(tensor)
        self._parts = [part.numpy() for part in _parts(tensor)]

    def checksum(self) -> str:
        """Of what the tensor holds now, as `checksum` gives it."""
        hasher = self._begun.copy()
        for part in self._parts:
            hasher.update(np.ascontiguousarray(part))
        return hasher.hexdigest()


def _begun(tensor: torch.Tensor) -> xxhash.xxh3_64:
    return xxhash.xxh3_64(f"{tensor.dtype} {list(tensor.shape)}".encode())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What counts of a contiguous tensor's bytes: views."""
    content = tensor.reshape(-1).view(torch.uint8)
    size = content.numel()
    if size <= WHOLE:
        return [content]
    distance = (size - BLOCK) // (BLOCKS - 1)
    return [content.as_strided((BLOCKS - 1, BLOCK), (distance, 1)), content[-BLOCK:]]


def checksum_of_all(checksums: Mapping[str, str]) -> str:
    """One for the whole model, whatever the order of its tensors."""
    return xxhash.xxh3_64_hexdigest(json.dumps(checksums, sort_keys=True).encode())


def sampled(names: Sequence[str], version: int) -> list[str]:
    """The tensors of a push that are compared: the last one, and others at equal distances that change every push."""
    stride = -(-len(names) // SAMPLED)
    return sorted({*names[max(version, 0) % stride :: stride], names[-1]}) if names else []
