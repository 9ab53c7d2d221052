"""What tells whether the weights that an engine reads are those that the trainer wrote."""

import json
from collections.abc import Mapping, Sequence

import torch
import xxhash

KEY = "xxh3_64"
"""Of a safetensors file's metadata: name of each tensor -> its checksum, as JSON."""
VERSION = "version"
"""Of the same metadata: which weights they are."""
BLOCK = 1 << 14
BLOCKS = 16
"""So many blocks of a tensor count, from its first byte to its last; of one that is not larger every byte does."""
SAMPLED = 32
"""Tensors of a push that are compared where comparing all would bring them back from GPUs."""


def checksum(tensor: torch.Tensor) -> str:
    """XXH3 of dtype, shape and content of a tensor.

    Of a large tensor blocks at equal distances stand for all of it: a transport goes wrong by a tensor, a bucket or a
    page, and reading everything again on both sides would cost as much as sending it.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    size = content.numel()
    if size > BLOCK * BLOCKS:
        starts = [number * (size - BLOCK) // (BLOCKS - 1) for number in range(BLOCKS)]
        content = torch.cat([content[start : start + BLOCK] for start in starts])
    hasher = xxhash.xxh3_64(f"{tensor.dtype} {list(tensor.shape)}".encode())
    hasher.update(content.cpu().numpy())
    return hasher.hexdigest()


def checksum_of_all(checksums: Mapping[str, str]) -> str:
    """One for the whole model, whatever the order of its tensors."""
    return xxhash.xxh3_64_hexdigest(json.dumps(checksums, sort_keys=True).encode())


def sampled(names: Sequence[str], version: int) -> list[str]:
    """The tensors of a push that are compared: the last one, and others at equal distances that change every push."""
    stride = -(-len(names) // SAMPLED)
    return sorted({*names[max(version, 0) % stride :: stride], names[-1]}) if names else []
