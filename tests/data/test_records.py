"""Rows against what was written, through every kind of source."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.records import RecordsSection
from megatron_r1.data.records import Records
from megatron_r1.errors import ConfigError, DataError

ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(10)]
SOURCES = ["lines", "compressed", "parquet", "saved", "saved_splits", "folder"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(kind: str, rows: list[dict[str, Any]]) -> str:
    """A source of that kind in the current folder."""
    table = datasets.Dataset.from_list(rows)
    if kind == "lines":
        Path("rows.jsonl").write_text(lines(rows), encoding="utf-8")
        return "rows.jsonl"
    if kind == "compressed":
        Path("rows.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
        return "rows.jsonl.gz"
    if kind == "parquet":
        table.to_parquet("rows.parquet")
        return "rows.parquet"
    if kind == "folder":
        Path("folder").mkdir()
        Path("folder/train.jsonl").write_text(lines(rows))
        return "./folder"
    (table if kind == "saved" else datasets.DatasetDict(train=table)).save_to_disk("saved")
    return "./saved"


def records(source: str, **keys: Any) -> Records:
    return Records(RecordsSection(source=source, **keys))


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_come_back_as_they_were_written(kind: str) -> None:
    found = records(written(kind, ROWS), columns={"problem": "question"})
    assert len(found) == 10
    assert [row.values for row in found] == ROWS
    assert found.names == ["question", "answer", "level"]
    assert found[7].text("problem") == "7 + 7?"
    assert found[-1].get("answer") == "18"
    assert found[3].get("nothing") is None
    assert [row.get("level") for row in found[2:4]] == [2, 0]


@pytest.mark.parametrize("kind", ["lines", "parquet", "saved_splits"])
def test_where_keeps_some_rows_and_their_places(kind: str) -> None:
    source = written(kind, ROWS)
    found = records(source, where={"level": [0, 2], "answer": "16"})
    assert [row.values for row in found] == [ROWS[8]]
    assert found[0].place in {"rows.jsonl, line 9", "rows.parquet, row 8", "./saved, row 8"}
    with pytest.raises(DataError, match=r"no row of .* has what `where` asks for"):
        len(records(source, where={"level": 7}))


@given(st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(TEXT)), min_size=1), st.booleans())
def test_any_json_survives(rows: list[dict[str, Any]], escaped: bool) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)  # no newline at the end
    Path("any.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [row.values for row in records("any.jsonl")] == rows


def test_nothing_is_read_before_the_first_row_is_asked_for() -> None:
    late = records("late.jsonl")
    Path("late.jsonl").write_text(lines(ROWS))
    assert len(late) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.jsonl holds no rows"),
        (b'{"a": 1}\n{"a": 1\n', "bad.jsonl, line 2: not valid JSON"),
        (b'{"a": 1}\n\n', "bad.jsonl, line 2: not valid JSON"),
        (b"[1]\n", "line 1: expected an object, it is a list"),
        (b'{"a": "\\uD800"}\n', "line 1: a lone surrogate"),
        (b'{"a": "\xff"}\n', "line 1: not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", "line 1: not valid JSON"),
    ],
)
def test_bad_lines_are_named(content: bytes, message: str) -> None:
    Path("bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        len(records("bad.jsonl"))


def test_a_compressed_file_that_is_cut_off_or_is_none() -> None:
    whole = gzip.compress(lines(ROWS).encode())
    for content in (whole[:-20], b"plain text"):
        Path("bad.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read bad\.jsonl\.gz"):
            len(records("bad.jsonl.gz"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere.jsonl.gz", "nowhere.parquet", "./nowhere"])
def test_a_missing_source(source: str) -> None:
    with pytest.raises(DataError, match=rf"cannot read {source}: [Nn]o such file"):
        len(records(source))


def test_a_damaged_parquet_file() -> None:
    Path("bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot load bad\.parquet"):
        len(records("bad.parquet"))


def test_a_hub_id_is_never_a_local_path(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lab/set").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"form of a hub id.*write '\./lab/set'"):
        len(records("lab/set"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load nobody/nothing \(split train\).*id of the hub"):
        len(records("nobody/nothing"))


def test_a_split_that_is_not_there() -> None:
    source = written("saved_splits", ROWS)
    assert len(records(source, split="train")) == 10
    with pytest.raises(DataError, match="no split 'tran', did you mean 'train'"):
        len(records(source, split="tran"))


def test_keys_of_a_dataset_mean_nothing_for_a_file() -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl is a file, so `split` means nothing"):
        records("rows.jsonl", split="train")


def test_columns_that_are_not_there() -> None:
    source = written("lines", ROWS)
    with pytest.raises(
        DataError, match=r"no column 'quest', did you mean 'question'\?; it has question, answer, level"
    ):
        len(records(source, columns={"problem": "quest"}))
    with pytest.raises(DataError, match="no column 'levels', did you mean 'level'"):
        len(records(source, where={"levels": 1}))
    with pytest.raises(DataError, match=r"no column 'problem'; it has .*columns = \{ problem = '\.\.\.' \}"):
        records(source).require("answer", "problem")
    with pytest.raises(ConfigError, match="no field 'promblem', did you mean 'problem'"):
        Records(RecordsSection(source=source, columns={"promblem": "question"}), fields=["problem"])


@pytest.mark.parametrize("value", [None, "", " \n", 7, ["a"]])
def test_a_value_that_is_no_text(value: Any) -> None:
    Path("rows.jsonl").write_text(lines([*ROWS, {"question": value}]))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 11: column 'question' holds .*; a text for `problem`"):
        records("rows.jsonl", columns={"problem": "question"})[10].text("problem")
