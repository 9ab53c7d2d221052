"""The index of a `torch_dist` checkpoint: which rectangle of which tensor stands where, checked to be whole."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_r1.errors import DataError
from megatron_r1.model.sharding import Piece

Record = dict[str, Any]
"""Where one written piece stands: JSON-able, so that a killed conversion goes on from its records."""


def record(piece: Piece, dtype: torch.dtype, file: str, start: int, length: int) -> Record:
    """One written piece."""
    return {
        "key": piece.key,
        "global_shape": list(piece.global_shape),
        "offset": list(piece.offset),
        "shape": list(piece.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "file": file,
        "start": start,
        "length": length,
    }


def index(records: Iterable[Record], objects: Iterable[str], empty: tuple[str, int]) -> Metadata:
    """The contents of `.metadata`.

    Args:
        records: all that was written.
        objects: unique keys of objects that are all alike.
        empty: file and length of the one item that serves them all.

    Raises:
        DataError: pieces of a key overlap, leave a gap, or disagree about shape or dtype.
    """
    pieces: dict[str, list[Record]] = defaultdict(list)
    for one in records:
        pieces[one["key"]].append(one)
    entries: dict[str, Any] = {key: _entry(key, parts) for key, parts in pieces.items()}
    stored = {
        MetadataIndex(key, part["offset"]): _StorageInfo(part["file"], part["start"], part["length"])
        for key, parts in pieces.items()
        for part in parts
    }
    for name in objects:
        entries[name] = BytesStorageMetadata()
        stored[MetadataIndex(name)] = _StorageInfo(empty[0], 0, empty[1])
    return Metadata(entries, storage_data=stored, storage_meta=StorageMeta(), version="1.0.0")


def _entry(key: str, parts: list[Record]) -> TensorStorageMetadata:
    shape, dtype = parts[0]["global_shape"], parts[0]["dtype"]
    for part in parts:
        if (part["global_shape"], part["dtype"]) != (shape, dtype):
            raise DataError(f"pieces of {key} disagree: {dtype} {shape} and {part['dtype']} {part['global_shape']}")
    if not _tile(shape, [(part["offset"], part["shape"]) for part in parts]):
        raise DataError(f"the pieces of {key} do not make up its shape {shape}: some overlap or are missing")
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, dtype)),
        torch.Size(shape),
        [ChunkStorageMetadata(torch.Size(part["offset"]), torch.Size(part["shape"])) for part in parts],
    )


def _tile(shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> bool:
    """Whether rectangles (offset, shape) cover a tensor once and only once: counted on the grid of their edges."""
    edges = []
    for axis, size in enumerate(shape):
        found = {0, size}
        for offset, extent in boxes:
            found |= {offset[axis], offset[axis] + extent[axis]}
        if min(found) < 0 or max(found) > size:
            return False
        edges.append({edge: place for place, edge in enumerate(sorted(found))})
    cover = torch.zeros([len(places) - 1 for places in edges], dtype=torch.int32)
    for offset, extent in boxes:
        cover[tuple(slice(p[a], p[a + n]) for p, a, n in zip(edges, offset, extent, strict=True))] += 1
    return bool((cover == 1).all())
