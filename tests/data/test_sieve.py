import datetime
import json
from pathlib import Path

import pytest

from megatron_r1.data.records import Row
from megatron_r1.data.sieve import DROPPED, KEPT, Sieve
from megatron_r1.errors import DataError


def row(**values: object) -> Row:
    return Row("a.jsonl, line 7", values, {})


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_keep_their_columns_and_reasons(tmp_path: Path) -> None:
    with Sieve(tmp_path) as sieve:
        sieve.keep(row(text="é\n", nested={"a": [1, None]}), pass_rate=0.5)
        sieve.drop(row(text="b"), reason="too long")
        sieve.keep(row(day=datetime.date(2024, 2, 29)))
    assert (sieve.kept, sieve.dropped) == (2, 1)
    assert lines(tmp_path / KEPT) == [
        {"text": "é\n", "nested": {"a": [1, None]}, "pass_rate": 0.5},
        {"day": "2024-02-29"},
    ]
    assert lines(tmp_path / DROPPED) == [{"place": "a.jsonl, line 7", "reason": "too long", "row": {"text": "b"}}]


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 7.*bytes"), Sieve(tmp_path) as sieve:
        sieve.keep(row(image=b"\x89PNG"))
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_files_of_an_earlier_run(tmp_path: Path) -> None:
    with Sieve(tmp_path) as sieve:
        sieve.keep(row(a=1))
    with pytest.raises(DataError), Sieve(tmp_path) as sieve:
        sieve.drop(row(a={1}))
    assert lines(tmp_path / KEPT) == [{"a": 1}]
    assert (tmp_path / DROPPED).read_text() == ""
    assert len(list(tmp_path.iterdir())) == 2
