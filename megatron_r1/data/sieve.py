"""What a sieve over a data set leaves: `kept.jsonl`, and `dropped.jsonl` with the reason for every row."""

import datetime
import decimal
import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from megatron_r1.data.files import aside
from megatron_r1.data.records import Row
from megatron_r1.errors import DataError

KEPT, DROPPED = "kept.jsonl", "dropped.jsonl"


class Sieve:
    """Writes both files; a context manager, whose files appear when it ends without an error.

    A kept row has the columns that it came with, so whatever read the source reads `kept.jsonl` as well.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.kept = 0
        self.dropped = 0
        self._stack = ExitStack()
        self._files: dict[str, TextIO] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            partials = {name: stack.enter_context(aside(self.output / name)) for name in (KEPT, DROPPED)}
            for name, partial in partials.items():  # opened last, so closed before the renames
                self._files[name] = stack.enter_context(partial.open("w", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def keep(self, row: Row, **added: Any) -> None:
        """Write the row's own columns, with the added ones behind them (or in their place)."""
        self._write(KEPT, row, {**row.values, **added})
        self.kept += 1

    def drop(self, row: Row, **reason: Any) -> None:
        """Write where the row stood, why it was dropped, and its columns."""
        self._write(DROPPED, row, {"place": row.place, **reason, "row": row.values})
        self.dropped += 1

    def _write(self, name: str, row: Row, values: dict[str, Any]) -> None:
        try:
            line = json.dumps(values, ensure_ascii=False, default=_plain)
        except TypeError as error:
            raise DataError(f"{row.place}: a column cannot be written to JSON ({error}); leave it out first") from error
        self._files[name].write(line + "\n")


def _plain(value: Any) -> str:
    """JSON for the other kinds of values that Arrow tables commonly hold."""
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")
