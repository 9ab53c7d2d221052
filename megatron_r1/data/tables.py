"""Tables on disk, row by row: JSONL files by themselves, everything else through the `datasets` library."""

import gzip
import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.errors import ConfigError, DataError, nearest

LINES = (".jsonl", ".jsonl.gz")
PARQUET = ".parquet"
_FOLDER = ("/", "./", "../", "~")


class Table(Protocol):
    """Rows by number, counted from 0."""

    names: list[str]
    """Of the columns."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> dict[str, Any]:
        """Values by column name; a column may be missing."""
        ...

    def place(self, number: int) -> str:
        """Where the row stands, for messages about it."""
        ...

    def only(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Every row in order, with at least the columns `names`."""
        ...


class JsonLines:
    """A JSONL file: its bytes, mapped into memory unless compressed, and where each line begins.

    Every line is parsed once at the start, so that a bad one is found before a run begins.

    Raises:
        DataError: missing or unreadable file; a line that is not an object in JSON.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._bytes = _contents(path)
        except (OSError, EOFError) as error:  # EOFError: a gzip file that was cut off
            raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        self._starts = array("Q", [0])
        names: dict[str, None] = {}
        while self._starts[-1] < len(self._bytes):
            end = self._bytes.find(b"\n", self._starts[-1]) + 1
            self._starts.append(end or len(self._bytes))
            names.update(dict.fromkeys(self.row(len(self) - 1)))
        self.names = list(names)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, number: int) -> dict[str, Any]:
        line = self._bytes[self._starts[number] : self._starts[number + 1]]
        try:
            record = json.loads(line)
            if b"\\ud" in line.lower():
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{self.place(number)}: a lone surrogate, which UTF-8 cannot express") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.place(number)}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.place(number)}: expected an object, it is a {type(record).__name__}")
        return record

    def place(self, number: int) -> str:
        return f"{self._path}, line {number + 1}"

    def only(self, names: list[str]) -> Iterator[dict[str, Any]]:
        return (self.row(number) for number in range(len(self)))


class ArrowTable:
    """One split of a dataset: a Parquet file, a folder, or an id on the hub. Arrow tables stay on disk.

    Raises:
        DataError: nothing there, no such split, or whatever else `datasets` cannot do.
        ConfigError: the text is an id's, but a file or folder of that name exists.
    """

    def __init__(self, source: str, name: str | None, split: str, revision: str | None) -> None:
        self._source = source
        self._rows = _load(source, name, split, revision)
        self.names: list[str] = self._rows.column_names

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        values: dict[str, Any] = self._rows[number]
        return values

    def place(self, number: int) -> str:
        return f"{self._source}, row {number}"

    def only(self, names: list[str]) -> Iterator[dict[str, Any]]:
        return iter(self._rows.select_columns(names))


def _contents(path: Path) -> "bytes | mmap.mmap":
    if path.suffix == ".gz":
        with gzip.open(path) as compressed:
            return compressed.read()
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""  # which cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load(source: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets

    path = Path(source).expanduser()
    local = source.endswith(PARQUET) or source.startswith(_FOLDER)
    if local and not path.exists():
        raise DataError(f"cannot read {source}: no such file or folder (looked from {Path.cwd()})")
    if not local and path.exists():  # `datasets` itself would take the folder
        raise ConfigError(
            f"source {source!r} has the form of a hub id, but it is here as well: write './{source}' for a folder; "
            f"files end in {', '.join((*LINES, PARQUET))}"
        )
    try:
        if source.endswith(PARQUET):
            return datasets.Dataset.from_parquet(str(path))
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            return _split(datasets.load_from_disk(str(path)), split, source)
        return datasets.load_dataset(str(path) if local else source, name, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # its loaders raise whatever their parsers do
        asked = f"split {split}" + (f" of {name}" if name else "") + (f" at {revision}" if revision else "")
        files = "" if local else f"; it was taken for an id of the hub, for files end in {', '.join((*LINES, PARQUET))}"
        raise DataError(f"`datasets` cannot load {source} ({asked}): {error}{files}") from error


def _split(found: Any, split: str, source: str) -> Any:
    """One split of what was saved; a dataset saved by itself is its only one."""
    splits = found if isinstance(found, dict) else {"train": found}
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}")
    return splits[split]
