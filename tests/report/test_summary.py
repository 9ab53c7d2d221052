import json
import os
from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from megatron_r1.report.summary import flatten, read_summary, write_summary


def test_round_trip_with_null_for_what_json_lacks(tmp_path):
    written = write_summary(tmp_path / "run", {"a": 1.5, "b": float("nan"), "c": {"d": [float("inf"), 2]}})
    assert written == {"a": 1.5, "b": None, "c": {"d": [None, 2]}}
    assert read_summary(tmp_path / "run") == written


def test_it_is_renamed_into_place_whole(tmp_path, monkeypatch):
    write_summary(tmp_path, {"old": 1})
    seen = []
    rename = os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append((json.loads(Path(source).read_text()), json.loads(Path(target).read_text())))
        rename(source, target)

    monkeypatch.setattr(Path, "replace", watch)
    write_summary(tmp_path, {"new": 2})
    assert seen == [({"new": 2}, {"old": 1})]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_figures_that_json_cannot_hold_leave_the_old_summary(tmp_path):
    write_summary(tmp_path, {"old": 1})
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"new": object()})
    assert read_summary(tmp_path) == {"old": 1}


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json is not JSON"):
        read_summary(tmp_path)


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
