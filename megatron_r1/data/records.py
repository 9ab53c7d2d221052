"""Rows of a data set: a JSONL or Parquet file, a local dataset folder, or a dataset of the Hugging Face hub.

A source is what its form says, whatever else may lie around:

* a text that ends in `.jsonl`, `.jsonl.gz` or `.parquet` is a file;
* a text that starts with `/`, `./`, `../` or `~` is a folder, written by `Dataset.save_to_disk` or holding data files;
* anything else is an id on the hub, such as `open-r1/OpenR1-Math-220k`.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_r1.config.records import RecordsSection
from megatron_r1.data.tables import LINES, PARQUET, ArrowTable, JsonLines, Table
from megatron_r1.errors import ConfigError, DataError, nearest

_DATASET_KEYS = ("name", "split", "revision")
"""Keys that mean nothing for a file."""


@dataclass(frozen=True)
class Row:
    """One row, with where it stands for messages about it."""

    place: str
    values: dict[str, Any]
    """Under the source's own column names."""
    columns: dict[str, str]

    def get(self, field: str) -> Any:
        """The value of a field, None where the row has none."""
        return self.values.get(self.columns.get(field, field))

    def text(self, field: str) -> str:
        """The value of a field that has to be a text with something in it.

        Raises:
            DataError: it is missing, empty, or no text.
        """
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            column = self.columns.get(field, field)
            raise DataError(f"{self.place}: column {column!r} holds {value!r}; a text for `{field}` was expected")
        return value


class Records(Sequence[Row]):
    """The rows of a source, read when the first is asked for.

    Args:
        config: the source.
        fields: the fields that `config.columns` may map; None = any.

    Raises:
        ConfigError: a source that is not clear, or keys that do not fit it.
    """

    def __init__(self, config: RecordsSection, fields: Sequence[str] | None = None) -> None:
        self.config = config
        known = list(config.columns) if fields is None else fields
        for field in config.columns:
            if field not in known:
                raise ConfigError(f"columns: no field {field!r}{nearest(field, known)}; there are {', '.join(known)}")
        given = [key for key in _DATASET_KEYS if getattr(config, key) is not None]
        if config.source.endswith((*LINES, PARQUET)) and given:
            raise ConfigError(f"{config.source} is a file, so `{given[0]}` means nothing; it belongs to a dataset")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = self._kept[row]
        return Row(self._table.place(number), self._table.row(number), self.config.columns)

    def __iter__(self) -> Iterator[Row]:
        return (self[row] for row in range(len(self)))

    @property
    def names(self) -> list[str]:
        """The source's own column names."""
        return self._table.names

    def require(self, *fields: str) -> None:
        """Check that there is a column for each of `fields`.

        Raises:
            DataError: there is none; the columns are listed.
        """
        for field in fields:
            column = self.config.columns.get(field, field)
            if column not in self.names:
                hint = f"; say which one holds it: columns = {{ {field} = '...' }}" if field == column else ""
                raise DataError(_no_column(self.config.source, column, self.names) + hint)

    @cached_property
    def _table(self) -> Table:
        config, source = self.config, self.config.source
        table: Table
        if source.endswith(LINES):
            table = JsonLines(Path(source).expanduser())
        else:
            table = ArrowTable(source, config.name, config.split or "train", config.revision)
        if not len(table):
            raise DataError(f"{source} holds no rows")
        for column in [*config.columns.values(), *config.where]:
            if column not in table.names:
                raise DataError(_no_column(source, column, table.names))
        return table

    @cached_property
    def _kept(self) -> Sequence[int]:
        """Numbers of the rows that `where` keeps."""
        table = self._table
        if not self.config.where:
            return range(len(table))
        wanted = {key: value if isinstance(value, list) else [value] for key, value in self.config.where.items()}
        rows = table.only(list(wanted))
        kept = [n for n, row in enumerate(rows) if all(row.get(key) in values for key, values in wanted.items())]
        if not kept:
            raise DataError(f"no row of {self.config.source} has what `where` asks for: {self.config.where}")
        return array("Q", kept)


def _no_column(source: str, column: str, names: list[str]) -> str:
    return f"{source} has no column {column!r}{nearest(column, names)}; it has {', '.join(names)}"
