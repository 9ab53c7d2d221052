"""The items of a `.distcp` file: one rectangle of a tensor each, in the container that `torch.save` writes."""

import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Entry, Spec, read
from megatron_r1.model.sharding import Piece


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor that was saved as one item."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: its first index on every axis, and the first behind it."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @classmethod
    def of(cls, part: Piece | Chunk) -> "Box":
        """The rectangle of a piece or chunk in the global tensor."""
        return cls(part.offset, tuple(low + size for low, size in zip(part.offset, part.shape, strict=True)))

    def common(self, other: "Box") -> "Box | None":
        """What two rectangles share."""
        low = tuple(map(max, self.low, other.low))
        high = tuple(map(min, self.high, other.high))
        return Box(low, high) if all(a < b for a, b in zip(low, high, strict=True)) else None

    def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """As an index of a tensor whose first element stands at `origin`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.low, self.high, origin, strict=True))

    @property
    def volume(self) -> int:
        """Elements."""
        return math.prod(b - a for a, b in zip(self.low, self.high, strict=True))


class ChunkReader:
    """Reads chunks; where their numbers stand in the files is looked up once. Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[Chunk, Entry | None] = {}
        self._whole: tuple[Chunk, torch.Tensor] | None = None
        """The last one that could not be read by rows: all stripes of it come in a row."""

    def read(self, chunk: Chunk, box: Box) -> torch.Tensor:
        """What a chunk holds of a box inside it: at most the rows that hold it are read. [box]

        Raises:
            DataError: the file is missing or damaged, or holds something else there.
        """
        index = box.within(chunk.offset)
        with _told(chunk):
            if chunk not in self._entries:
                self._entries[chunk] = _entry(chunk)
            entry = self._entries[chunk]
            if entry is None:  # not in their natural order
                whole = self._whole
                if whole is None or whole[0] != chunk:
                    self._whole = whole = chunk, _loaded(chunk, "cpu")
                return whole[1][index]
            axis = next((axis for axis, size in enumerate(chunk.shape) if size != 1), None)
            if axis is None:
                return read(entry).view(chunk.shape)[index]
            rows = read(entry.rows(index[axis].start, index[axis].stop))
            return rows.view(*chunk.shape[:axis], *rows.shape)[(*index[:axis], slice(None), *index[axis + 1 :])]


@contextmanager
def _told(chunk: Chunk) -> Iterator[None]:
    """Whatever a file that is damaged makes of reading it, as a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {chunk.file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise DataError(f"{chunk.file}: refuses to load what stands for {chunk.key}: {_reason(error)}") from error
    except (RuntimeError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{chunk.file} is damaged where {chunk.key} stands: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line: torch's errors go on with advice to load the file unsafely."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _entry(chunk: Chunk) -> Entry | None:
    """Where a chunk's numbers stand, without the axes of one element before all others; None if not row by row."""
    outline = _loaded(chunk, "meta")  # all but the numbers
    if not outline.is_contiguous():
        return None
    storage: Any = outline.untyped_storage()
    begin = chunk.start + storage._checkpoint_offset + outline.storage_offset() * outline.itemsize
    if begin + outline.nbytes > chunk.start + chunk.length:
        raise EOFError("the item is too short")
    shape = tuple(dropwhile((1).__eq__, chunk.shape))
    return Entry(chunk.key, chunk.dtype, shape, chunk.file, begin, outline.nbytes)


def _loaded(chunk: Chunk, device: str) -> torch.Tensor:
    """A chunk as torch loads it, checked against the index."""
    with chunk.file.open("rb") as file:
        view: Any = _create_file_view(file, chunk.start, chunk.length)
        tensor = torch.load(view, map_location=device, weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"it is a {type(tensor).__name__}")
    if tensor.dtype != chunk.dtype or tuple(tensor.shape) != chunk.shape:
        raise ValueError(f"it is {tensor.dtype} {list(tensor.shape)}, not {chunk.dtype} {list(chunk.shape)}")
    return tensor


class _Frame:
    """A file that keeps what stands before and behind the numbers, which `torch.save` passes over in it."""

    def __init__(self) -> None:
        self.parts = [b""]

    def write(self, data: memoryview) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, nbytes: int, whence: int) -> None:
        assert whence == os.SEEK_CUR
        self.parts.append(b"")

    def flush(self) -> None:
        pass


@lru_cache(maxsize=4096)
def frame(spec: Spec) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and behind the numbers of a tensor, where checksums are off."""
    file: Any = _Frame()
    with torch.serialization.skip_data():
        torch.save(torch.empty(spec.shape, dtype=spec.dtype), file)
    before, behind = (*file.parts, b"")[:2]
    return before, behind


def saved_nbytes(spec: Spec) -> int:
    """Bytes that an item takes."""
    return spec.nbytes + sum(map(len, frame(spec)))
