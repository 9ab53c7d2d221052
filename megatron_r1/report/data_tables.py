"""Figures about a data set, as tables: what `collect`, `preferences` and the `data` verbs leave in `summary.json`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataTable:
    """Rows with a name each and the same columns."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def data_tables(summary: dict[str, Any]) -> list[DataTable]:
    """Every mapping of names to records becomes a table; the plain numbers beside them make the first one."""
    tables = []
    if plain := {name: value for name, value in summary.items() if _is_plain(value)}:
        tables.append(DataTable("", ["value"], [(_words(name), [_text(value)]) for name, value in plain.items()]))
    for name, value in summary.items():
        if isinstance(value, dict) and value:
            tables.extend(_tables(_words(name), value))
    return tables


def _tables(title: str, records: dict[str, Any]) -> list[DataTable]:
    if all(_is_plain(value) for value in records.values()):
        return [DataTable(title, ["value"], [(_words(name), [_text(value)]) for name, value in records.items()])]
    if not all(isinstance(value, dict) for value in records.values()):  # one record with records in it
        records = _flat(records)
        return _tables(title, records) if records else []
    flat = {name: _flat(value) for name, value in records.items()}
    columns = list(dict.fromkeys(column for row in flat.values() for column in row))
    rows = [(_words(name), [_text(row.get(column)) for column in columns]) for name, row in flat.items()]
    return [DataTable(title, [_words(column) for column in columns], rows)]


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name} ")
        elif _is_plain(value):
            found[prefix + name] = value
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
