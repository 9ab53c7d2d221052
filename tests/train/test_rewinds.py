"""Which rows a run takes that has gone back, worked by hand and as properties."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.guard import PretrainGuardSection
from megatron_r1.errors import DataError, NumericsError
from megatron_r1.train.rewinds import FILE, Rewinds


def rows(rewinds: Rewinds, count: int) -> list[int]:
    return [rewinds.row(position) for position in range(count)]


def test_without_rewinds_each_position_is_its_row(tmp_path: Path) -> None:
    assert rows(Rewinds(tmp_path, 10, anew=True), 10) == list(range(10))


def test_what_was_read_since_the_checkpoint_is_jumped_over(tmp_path: Path) -> None:
    rewinds = Rewinds(tmp_path, 12, anew=True)
    rewinds.add(step=5, target=3, start=3, end=6)  # the rows 3, 4 and 5; the first ones come again at the end
    assert rows(rewinds, 12) == [0, 1, 2, 6, 7, 8, 9, 10, 11, 0, 1, 2]
    rewinds.add(step=4, target=3, start=3, end=5)  # 6 and 7
    assert rows(rewinds, 8) == [0, 1, 2, 8, 9, 10, 11, 0]
    rewinds.add(step=4, target=2, start=2, end=5)  # 2, 8 and 9, and all that were skipped in between
    assert rows(rewinds, 6) == [0, 1, 10, 11, 0, 1]
    rewinds.save()
    assert rows(Rewinds(tmp_path, 12, anew=False), 6) == [0, 1, 10, 11, 0, 1]
    assert [entry["step"] for entry in json.loads((tmp_path / FILE).read_text())] == [5, 4, 4]
    assert rows(Rewinds(tmp_path, 12, anew=True), 12) == list(range(12))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), min_size=1, max_size=5))
def test_a_row_that_was_skipped_never_comes_again(spans: list[tuple[int, int]]) -> None:
    """Against a plain list from which the rows are taken out."""
    rewinds, expected = Rewinds(Path("/nonexistent"), 1000, anew=True), list(range(1000))
    for start, length in spans:
        rewinds.add(step=1, target=0, start=start, end=start + length)
        skipped = range(expected[start], expected[start + length - 1] + 1)
        expected = [row for row in expected if row not in skipped]
        assert rows(rewinds, 1000) == (expected + expected)[:1000]


def test_the_checkpoint_gone_back_to(tmp_path: Path) -> None:
    rewinds, section = Rewinds(tmp_path, 1000, anew=True), PretrainGuardSection(rewind_steps=100, max_rewinds=1)
    assert rewinds.target(650, [400, 500, 600], section) == 500
    assert rewinds.target(600, [400, 500, 600], section) == 500
    assert rewinds.target(620, [560, 600, 640], section) == 560
    with pytest.raises(NumericsError, match="before the first checkpoint"):
        rewinds.target(620, [], section)
    rewinds.add(step=620, target=560, start=560, end=621)
    with pytest.raises(NumericsError, match="after max_rewinds = 1 rewinds"):
        rewinds.target(700, [560], section)


def test_a_run_without_rows_stops(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="hardly any rows are left"):
        Rewinds(tmp_path, 10, anew=True).add(step=9, target=0, start=0, end=10)


@pytest.mark.parametrize("text", ['[{"first": 1}]', "{", "[1]", "7"])
def test_a_damaged_list_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"skipped_rows\.json is not a list of skipped rows"):
        Rewinds(tmp_path, 10, anew=False)
