"""JSONL documents in and finished files out; a reader never meets half of one."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError


def documents(path: Path) -> Iterator[str]:
    """The `text` of every line of a JSONL file.

    Raises:
        DataError: missing, unreadable or empty file; a line that is not an object with a non-empty `text`.
    """
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _text(path, number, line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if number == 0:
        raise DataError(f"{path} is empty; one JSON object a line with a `text` key was expected")


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        keys = f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        raise DataError(f"{path}, line {number}: expected an object with a non-empty string `text`; {keys}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number}: `text` holds a lone surrogate, which UTF-8 cannot express") from error
    return text


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a killed process that had the same number, as they do in containers
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file in one piece."""
    with aside(path) as partial, partial.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    with aside(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk.

    Raises:
        OSError: the disk refuses what it has not written yet.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
