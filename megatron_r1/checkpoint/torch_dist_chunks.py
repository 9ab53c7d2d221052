"""The items of a `.distcp` file: one rectangle of a tensor each, in the container that `torch.save` writes."""

import math
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Spec
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


def load_box(chunk: Chunk, box: Box) -> torch.Tensor:
    """What a chunk holds of a box inside it; of a chunk much larger than that, only the rows that hold it are read.

    Raises:
        DataError: the file is missing or damaged, or holds something else there.
    """
    index = box.within(chunk.offset)
    if math.prod(chunk.shape) <= 2 * box.volume:
        return load(chunk)[index]
    axis = next(axis for axis, size in enumerate(chunk.shape) if size > 1)
    return load(chunk, index[axis], axis)[(*index[:axis], slice(None), *index[axis + 1 :])]


def load(chunk: Chunk, rows: slice | None = None, axis: int = 0) -> torch.Tensor:
    """A whole chunk; with `rows`, only those of `axis`, before which all axes have one element.

    Raises:
        DataError: the file is missing or damaged, or holds something else there.
    """
    try:
        with chunk.file.open("rb") as file:
            view: Any = _create_file_view(file, chunk.start, chunk.length)
            if rows is None:
                return _checked(chunk, torch.load(view, map_location="cpu", weights_only=True))
            with FakeTensorMode():  # reads all but the numbers, and where they begin
                outline = _checked(chunk, torch.load(view, weights_only=True))
            return _read_rows(view, outline, rows, axis)
    except OSError as error:
        raise DataError(f"cannot read {chunk.file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise DataError(f"{chunk.file}: refuses to load what stands for {chunk.key}: {_reason(error)}") from error
    except (RuntimeError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{chunk.file} is damaged where {chunk.key} stands: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line: torch's errors go on with advice to load the file unsafely."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _checked(chunk: Chunk, tensor: Any) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"it is a {type(tensor).__name__}")
    if tensor.dtype != chunk.dtype or tuple(tensor.shape) != chunk.shape:
        raise ValueError(f"it is {tensor.dtype} {list(tensor.shape)}, not {chunk.dtype} {list(chunk.shape)}")
    return tensor


def _read_rows(view: Any, outline: torch.Tensor, rows: slice, axis: int) -> torch.Tensor:
    """Rows of a tensor whose numbers stand in their natural order, else the same of the whole."""
    if not outline.is_contiguous():
        view.seek(0)
        whole: torch.Tensor = torch.load(view, map_location="cpu", weights_only=True)
        return whole.narrow(axis, rows.start, rows.stop - rows.start)
    shape = [*outline.shape[:axis], rows.stop - rows.start, *outline.shape[axis + 1 :]]
    out = torch.empty(shape, dtype=outline.dtype)
    first = outline.storage_offset() + rows.start * outline.stride(axis)
    begin: Any = outline.untyped_storage()
    view.seek(begin._checkpoint_offset + first * outline.itemsize)
    target = memoryview(out.view(-1).view(torch.uint8).numpy())
    while target:
        count = view.readinto(target)
        if not count:
            raise EOFError("the file is too short")
        target = target[count:]
    return out


def save(tensor: torch.Tensor, file: Any) -> None:
    """Append a tensor to an open file, its numbers not copied where they are contiguous.

    Raises:
        OSError: the file cannot be written, because the disk is full for example.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:  # torch.save writes whole storages
        tensor = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)
    try:
        torch.save(tensor, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save goes on to complain of the position in the file
            raise error.__context__ from None
        raise


class _Count:
    """A file that only counts."""

    size = 0

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


@lru_cache(maxsize=4096)
def saved_nbytes(spec: Spec) -> int:
    """Bytes that `save` writes for a tensor, where checksums are off (else its memory would be touched)."""
    sink = _Count()
    save(torch.empty(spec.shape, dtype=spec.dtype), sink)
    return sink.size
