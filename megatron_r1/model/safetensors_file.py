"""One safetensors file: its header checked against its bytes, its tensors read and written one at a time.

Layout: 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}`, then the tensors
without gaps. Files are read and written, not mapped: mapped pages count as the process's memory for as long as the
system likes, and a truncated file would kill the process instead of raising. Large tensors can be read and written in
stripes of rows, which stay in a core's caches on their way.
"""

import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_r1.errors import DataError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Names of the format and what torch calls them: all that both have, but for packed 4-bit numbers."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the reference reader's own limit
_MAX_AXES, _MAX_SIZE = 64, 2**63 - 1  # torch's
_METADATA = "__metadata__"
STRIPE_BYTES = 2**21
"""Of a tensor that is read in stripes, about so much at a time."""
_AHEAD_BYTES = 2 * STRIPE_BYTES


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def stripes(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Consecutive blocks of rows, each from the first of the pair up to the second.

        Args:
            multiple: all but the last have a multiple of so many rows.
        """
        rows, block = (self.shape or (1,))[0], multiple * math.prod(self.shape[1:]) * self.dtype.itemsize
        step = multiple * max(1, STRIPE_BYTES // max(1, block))
        return ((row, min(row + step, rows)) for row in range(0, max(1, rows), step))


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    """In the file, of its first byte."""
    nbytes: int

    def rows(self, start: int, stop: int) -> "Entry":
        """Some of its rows, as a tensor of their own."""
        if (start, stop) == (0, (self.shape or (1,))[0]):
            return self
        row, shape = self.nbytes // self.shape[0], (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file in the order in which they stand there.

    Raises:
        DataError: the file cannot be read, is truncated, is no safetensors file, or its header contradicts itself:
            a name twice, an unknown dtype, a size that is not shape x dtype, tensors that overlap or leave a gap.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER or not (text := file.read(length)).startswith(b"{"):
                raise DataError(f"{path} is not a safetensors file: it does not begin with a header")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(text) < length:
        raise DataError(f"{path} is truncated: its header has {length} bytes, of which {len(text)} are there")
    entries = [_entry(path, name, value, 8 + length) for name, value in _parse(path, text).items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_extent(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def read(entry: Entry) -> torch.Tensor:
    """A tensor's values in fresh memory. What stands behind them in the file is asked of the disk ahead.

    Raises:
        DataError: the file cannot be read, or has become shorter than its header says.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    view = _bytes(tensor)
    done = 0
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, entry.offset + entry.nbytes, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            while done < entry.nbytes:
                count = os.preadv(descriptor, [view[done:]], entry.offset + done)
                if not count:
                    raise DataError(f"{entry.path} is truncated: it ends within {entry.name}")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"cannot read {entry.name} from {entry.path}: {error.strerror}") from error
    return tensor


class Writer:
    """A file whose tensors are given in any order, from any thread.

    As a context it closes the file at the end, or removes it after an error. Tensors stand by falling size of their
    numbers, so that each is aligned, and within one size in the order of `specs`.

    Args:
        path: where it will stand; a file of that name is overwritten.
        specs: every tensor that it will hold.
        metadata: text by name, for the header.

    Raises:
        DataError: the file cannot be created.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self._specs = path, dict(specs)
        layout = Layout(self._specs)
        header = layout.header(metadata or {})
        self._offsets = {name: len(header) + offset for name, offset in layout.offsets.items()}
        self._missing, self._lock = {name: spec.nbytes for name, spec in specs.items()}, threading.Lock()
        self._turn = threading.Lock()  # the kernel lets threads spin while another writes to the file
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._write(memoryview(header), 0)
            self._extend(len(header) + layout.size)
        except BaseException:
            self.abort()
            raise

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            DataError: the name is unknown or was put before, dtype or shape differ from its spec, or the disk is full.
        """
        spec = self._specs.get(name)
        if spec and tuple(tensor.shape) != spec.shape:
            raise self._misfit(name, tensor, spec)
        self.put_rows(name, tensor)

    def put_rows(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of a tensor, from the first to the last; one thread a tensor.

        Raises:
            DataError: as `put`, or there are more rows than the tensor has.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise DataError(f"{self.path} has no place for a tensor {name}")
        if (rows.dtype, tuple(rows.shape[1:])) != (spec.dtype, spec.shape[1:]):
            raise self._misfit(name, rows, spec)
        with self._lock:
            missing = self._missing.get(name, -1)
            if missing < rows.nbytes:
                raise DataError(f"{self.path}: tensor {name} was given twice")
            self._missing[name] -= rows.nbytes
            if missing == rows.nbytes:
                del self._missing[name]
        try:
            self._write(_bytes(rows.detach().cpu().contiguous()), self._offsets[name] + spec.nbytes - missing)
        except BaseException:
            self._missing[name] = missing  # or `close` would take what stands there now for the tensor
            raise

    def close(self) -> None:
        """Finish the file: it is on the disk when this returns.

        Raises:
            DataError: a tensor was not put, or the disk failed.
        """
        try:
            if self._missing:
                first = next(name for name in self._specs if name in self._missing)
                raise DataError(f"{self.path} lacks {len(self._missing)} of its tensors, for example {first}")
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._descriptor)

    def abort(self) -> None:
        """Give up: the file is removed."""
        try:
            os.close(self._descriptor)
        finally:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            with self._turn:
                while len(view):
                    count = os.pwrite(self._descriptor, view, offset)
                    view, offset = view[count:], offset + count
        except OSError as error:
            raise self._failed(error) from error

    def _extend(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise self._failed(error) from error

    def _misfit(self, name: str, tensor: torch.Tensor, spec: Spec) -> DataError:
        return DataError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, but {self.path} has a place for "
            f"{spec.dtype} {list(spec.shape)}"
        )

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"cannot write {self.path}: {error.strerror}")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        "".join(header).encode()  # names may be no text all the same: JSON can escape half a character
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a safetensors file: its header is not JSON in UTF-8 ({error})") from error
    header.pop(_METADATA, None)
    result: dict[str, Any] = header
    return result


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(first for first, second in itertools.pairwise(names) if first == second)
        raise DataError(f"its header names {twice} twice")
    return result


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    """One item of a header, `start` being where the tensors begin in the file."""
    try:
        shape, (begin, end), kind = tuple(value["shape"]), value["data_offsets"], value["dtype"]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{path}: the header's entry of {name} lacks dtype, shape or data_offsets") from None
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise DataError(f"{path}: the header's entry of {name} has a size that is not a whole number")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise DataError(f"{path}: {name} has dtype {kind!r}, which is not one of {', '.join(DTYPES)}")
    extents = tuple(size for size in shape if size)  # of empty tensors too: torch counts the bytes of theirs
    if len(shape) > _MAX_AXES or max((*shape, end)) > _MAX_SIZE or Spec(dtype, extents).nbytes > _MAX_SIZE:
        raise DataError(f"{path}: the header's entry of {name} has a size that no tensor has")
    if end - begin != (expected := Spec(dtype, shape).nbytes):
        raise DataError(f"{path}: {name} {kind} {list(shape)} takes {expected} bytes, but has {end - begin}")
    return Entry(name, dtype, shape, path, start + begin, end - begin)


def _check_extent(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """That the tensors fill the file from `start` to its end, one behind the other."""
    end = start
    for entry in entries:
        if entry.offset != end:
            problem = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise DataError(f"{path}: {entry.name} {problem}")
        end += entry.nbytes
    if size < end:
        raise DataError(f"{path} is truncated: {end - size} of its {end} bytes are missing; download it again")
    if size > end:
        raise DataError(f"{path} has {size - end} bytes behind its last tensor")


class Layout:
    """Where tensors stand in a file, by falling size of their numbers, and the file's beginning.

    Args:
        specs: every tensor that it will hold.
    """

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        entries: dict[str, dict[str, Any]] = {}
        self.size = 0
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            extent = (self.size, self.size + spec.nbytes)
            entries[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": extent}
            self.size += spec.nbytes
        self.offsets = {name: entries[name]["data_offsets"][0] for name in specs}
        """Of each tensor's first byte, behind the header."""
        self._entries = _json(entries)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """What stands before the tensors. `metadata`: text by name."""
        text = _json({_METADATA: {"format": "pt", **metadata}})
        if self.offsets:
            text = f"{text[:-1]},{self._entries[1:]}"
        encoded = text.encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
