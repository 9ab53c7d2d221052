"""JSON lines that survive a kill: appended one by one, cut back on resume, read back whole."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.errors import DataError

Row = dict[str, Any]


class Journal:
    """An append-only file of JSON objects, each with a `step`.

    Rows of `resume_step` and later are dropped on opening, because those steps are about to be run again.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self.kept = [row for row in read(path) if row["step"] < resume_step]
        replace_text(path, "".join(_line(row) for row in self.kept))
        self._file = path.open("a", encoding="utf-8", errors="replace")

    def append(self, row: Row) -> None:
        """Write one row and hand it to the operating system at once."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[Row]:
    """All rows of a journal; none if there is no file. A last line without its newline, cut short by a
    kill, is left out.

    Raises:
        DataError: a whole line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); remove that line and try again") from error
        rows.append(row)
    return rows


def replace_text(path: Path, text: str) -> None:
    """Write a whole file aside, then rename it, so that a reader finds the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8", errors="replace")
    aside.replace(path)


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity as None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _line(row: Row) -> str:
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"
