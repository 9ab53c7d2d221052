import json

import pytest

from megatron_r1.errors import DataError
from megatron_r1.report.journal import Journal, read, replace_text


def test_each_row_can_be_read_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        for step in range(3):
            journal.append({"step": step, "text": "zwölf\n\u2028"})
            assert json.loads(path.read_text().split("\n")[step]) == {"step": step, "text": "zwölf\n\u2028"}
    assert [row["step"] for row in read(path)] == [0, 1, 2]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 is not JSON"):
        read(path)


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        replace_text(path, object())  # type: ignore[arg-type]
    assert path.read_text() == "old"
