"""The documents of JSONL and Parquet files, in pieces that can be read apart.

A piece is a range of bytes of a JSONL file (the lines that begin in it), some row groups of a Parquet file, or a whole
compressed file.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_r1.errors import DataError

PARQUET = ".parquet"
COMPRESSED = (".gz", ".zst")
ENDINGS = (".jsonl", *(f".jsonl{ending}" for ending in COMPRESSED), PARQUET)
"""What is read of a folder; a file that is named itself is taken for JSONL if it has none of these."""
_PIECES = 512
"""About how many pieces all inputs are cut into, ..."""
_SMALLEST, _LARGEST = 4 << 20, 256 << 20
"""... in bytes of one. A killed run loses the pieces that it was working on."""
_ROWS = 256
"""Rows of a Parquet file that are in memory at once."""
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Piece:
    """One part of a file."""

    path: Path
    start: int
    stop: int
    """Bytes of a JSONL file, or row groups of a Parquet file, from `start` to before `stop`."""
    nbytes: int
    """How large it is on the disk."""
    version: tuple[int, int]
    """Size and time of change of the whole file."""


def cut(inputs: dict[str, list[Path]]) -> dict[str, list[Piece]]:
    """The pieces of each input, in order.

    Raises:
        DataError: a file is missing, unreadable or empty; a folder holds none.
    """
    files = {name: [file for path in paths for file in _files(path)] for name, paths in inputs.items()}
    total = sum(file.stat().st_size for paths in files.values() for file in paths)
    size = min(max(total // _PIECES, _SMALLEST), _LARGEST)
    return {name: [piece for file in paths for piece in _cut(file, size)] for name, paths in files.items()}


def documents(piece: Piece, key: str) -> Iterator[str]:
    """The text of every document of a piece.

    Raises:
        DataError: a line or row that holds no text under `key`; file and line are named.
    """
    try:
        yield from _column(piece, key) if piece.path.suffix == PARQUET else _lines(piece, key)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(piece.path, error) from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"cannot read {path}: no such file or folder (looked from {Path.cwd()})")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
    if not found:
        raise DataError(f"the folder {path} holds no file that ends in {', '.join(ENDINGS)}")
    return found


def _cut(path: Path, size: int) -> Iterator[Piece]:
    state = path.stat()
    version = (state.st_size, state.st_mtime_ns)
    if not state.st_size:
        raise DataError(f"{path} is empty; one JSON object a line was expected")
    if path.suffix == PARQUET:
        yield from _row_groups(path, size, version)
        return
    step = state.st_size if path.suffix in COMPRESSED else size
    for start in range(0, state.st_size, step):
        stop = min(start + step, state.st_size)
        yield Piece(path, start, stop, stop - start, version)


def _row_groups(path: Path, size: int, version: tuple[int, int]) -> Iterator[Piece]:
    try:
        metadata = parquet.ParquetFile(path).metadata
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    if not metadata.num_rows:
        raise DataError(f"{path} holds no rows")
    start = nbytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        nbytes += sum(row_group.column(number).total_compressed_size for number in range(row_group.num_columns))
        if nbytes >= size or group + 1 == metadata.num_row_groups:
            yield Piece(path, start, group + 1, nbytes, version)
            start, nbytes = group + 1, 0


def _lines(piece: Piece, key: str) -> Iterator[str]:
    compressed = piece.path.suffix in COMPRESSED
    # Arrow reads gzip and Zstandard, files of several frames included.
    stream: Any = pyarrow.input_stream(piece.path, "detect") if compressed else piece.path.open("rb", 0)
    with io.BufferedReader(stream, _BUFFER) as file:
        first = 0
        if piece.start:  # The line that is under way belongs to the piece before.
            file.seek(piece.start - 1)
            first = piece.start - 1 + len(file.readline())
        position = first
        for number, line in enumerate(file, start=1):
            if position >= piece.stop and not compressed:
                return
            position += len(line)
            try:
                yield _text(_record(line), key)
            except ValueError as error:
                raise DataError(f"{piece.path}, line {_newlines(piece.path, first) + number}: {error}") from error
        if not position:
            raise DataError(f"{piece.path} is empty; one JSON object a line was expected")


def _column(piece: Piece, key: str) -> Iterator[str]:
    file = parquet.ParquetFile(piece.path)
    if key not in file.schema_arrow.names:
        raise DataError(f"{piece.path} has no column {key!r}; it has {', '.join(file.schema_arrow.names)}")
    number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    groups = list(range(piece.start, piece.stop))
    for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[key]):
        for text in batch.column(0).to_pylist():
            try:
                yield _text({key: text}, key)
            except ValueError as error:
                raise DataError(f"{piece.path}, row {number}: {error}") from error
            number += 1


def _record(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error


def _text(record: Any, key: str) -> str:
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        keys = f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        raise ValueError(f"expected an object with a non-empty string {key!r}; {keys}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} holds a lone surrogate, which UTF-8 cannot express") from error
    return text


def _newlines(path: Path, stop: int) -> int:
    """How many lines end before byte `stop`."""
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, _BUFFER))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
