"""Two checkpoints as named tensors, whatever their formats, and what of them is equal.

The hash of a tensor is the SHA-256 of a line with dtype and shape and of its bytes; that of a checkpoint is the SHA-256
of the lines `<hash>  <name>` of its tensors in the order of their names.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.source import open_source
from megatron_r1.model.family import HFConfig
from megatron_r1.model.hf_folder import TensorReader, read_config
from megatron_r1.model.safetensors_file import read

Names = tuple[str, ...]
"""Hugging Face tensors that are read together: those of one rule."""
_CHUNK = 1 << 22
"""Numbers that are subtracted at once, in float64."""


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints."""

    hf: HFConfig
    sizes: dict[Names, int]
    """What it holds, in bytes."""
    read: Callable[[Names], list[torch.Tensor]]
    """Values, from any thread."""
    problems: list[str] = field(default_factory=list)
    """Tensors that are not compared, because no rule knows them or because they are missing."""


@dataclass(frozen=True)
class Difference:
    """A tensor that both have, with other contents."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[list[int], list[int]]
    max_difference: float | None
    """Largest absolute difference of two numbers; None where shapes differ or only one of the numbers is finite."""
    relative_error: float | None
    """Norm of the difference over the norm of the first; None as above, or where the first is all zeros."""


def open_side(path: Path, config: Path | None, mtp: bool = True) -> Side:
    """A checkpoint of any format by the rules of its family: FP8 dequantised, each tensor once.

    Raises:
        DataError: it cannot be read, or is a training checkpoint whose files are not what was written.
    """
    manifest.refuse_damaged(path)
    source = open_source(path, config, mtp)
    rules = {rule.hf: rule for rule in source.rules}
    missing = {names: [name for name in names if name not in source] for names in rules}
    problems = [f"{name} is missing" for names in missing.values() for name in names]
    problems += [f"{name} is known to no rule" for name in source.unknown()]
    sizes = {names: sum(source.spec(name).nbytes for name in names) for names in rules if not missing[names]}
    return Side(source.hf, sizes, lambda names: source.read(rules[names]), problems)


def open_stored_side(folder: Path) -> Side:
    """A Hugging Face folder as it stands in its files.

    Raises:
        DataError: it cannot be read.
    """
    entries = TensorReader(folder).stored
    sizes: dict[Names, int] = {(name,): entry.nbytes for name, entry in entries.items()}
    return Side(read_config(folder), sizes, lambda names: [read(entries[name]) for name in names])


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    content = hashlib.sha256(f"{_dtype(tensor)} {list(tensor.shape)}\n".encode())
    content.update(memoryview(_bytes(tensor).numpy()))
    return content.hexdigest()


def digest_of_all(digests: Iterable[tuple[str, str]]) -> str:
    """The hash of a checkpoint from the names and hashes of its tensors."""
    lines = [f"{content}  {name}\n" for name, content in sorted(digests)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bytes; NaN equals itself, -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def difference(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    """How far two tensors lie apart; numbers that are infinite or not a number in both alike do not differ."""
    labels = (_dtype(a), _dtype(b)), (list(a.shape), list(b.shape))
    if a.shape != b.shape:
        return Difference(name, *labels, None, None)
    largest = squares = norm = 0.0
    pairs = zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True)
    for x, y in ((x.double(), y.double()) for x, y in pairs):
        apart = (x - y).abs_()
        apart[(x == y) | (x.isnan() & y.isnan())] = 0.0
        largest = max(largest, *apart.aminmax()) if apart.isfinite().all() else math.inf
        squares += float(apart.square().sum())
        norm += float(x[x.isfinite()].square().sum())
        if math.isinf(largest):
            return Difference(name, *labels, None, None)
    relative = math.sqrt(squares / norm) if norm else None if squares else 0.0
    return Difference(name, *labels, float(largest), relative)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
