from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.data.tasks.math import final_answer
from megatron_r1.errors import ConfigError, DataError
from tests.data.tasks.written import build


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": " 72 "}, "72"),
        ({"answer": 3.5}, "3.5"),
        ({"answer": 0}, "0"),
        ({"answer": "3 * 24 = <<3*24=72>>72\n#### 72"}, "72"),
        ({"answer": r"So it is \boxed{x^2}."}, "x^2"),
        ({"answer": None, "solution": r"First \boxed{1}, no: \boxed{\frac{1}{2}}"}, r"\frac{1}{2}"),
        ({"answer": "", "solution": r"\boxed { \{1, 2\} }"}, r"\{1, 2\}"),
        ({"solution": r"\boxed{\begin{pmatrix} 1 \\ {2} \end{pmatrix}}"}, r"\begin{pmatrix} 1 \\ {2} \end{pmatrix}"),
        ({"solution": r"\boxed{7} and then \boxed{8"}, "7"),
        ({"solution": r"\boxed{7} and then \boxed 8"}, "7"),
    ],
)
def test_where_the_answer_is_found(row: dict[str, Any], answer: str, tmp_path: Path) -> None:
    problem = build("math", tmp_path, [{"problem": " What? ", **row}]).problem(0, 0)
    assert (problem.text, problem.answer) == ("What?", answer)
    assert problem.metadata == {"place": f"{tmp_path}/math.jsonl, line 1"}


@pytest.mark.parametrize("row", [{}, {"answer": " "}, {"answer": True}, {"solution": "none"}, {"solution": r"\boxed{"}])
def test_a_row_without_an_answer_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"problem": "1?", "answer": "1"}, {"problem": "2?", **row}]
    with pytest.raises(DataError, match=r"math\.jsonl, line 2: no answer.*the columns are problem"):
        build("math", tmp_path, rows).row(1)


@given(st.text("{}\\boxed #", max_size=40))
def test_any_text_has_an_answer_or_none(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or answer in text


def test_other_columns_and_languages(tmp_path: Path) -> None:
    rows = [{"q": "1?", "a": "1", "language": "de"}, {"q": "2?", "a": "2", "language": "German"}]
    task = build("math", tmp_path, rows, columns={"problem": "q", "answer": "a"})
    assert [task.row(number).answer for number in (0, 1)] == ["1", "2"]
    assert task.row(0).metadata["language"] == "de"
    assert "language" not in task.row(1).metadata
    assert (task.size, task.name) == (2, "math")


def test_a_missing_column_and_a_wrong_mapping(tmp_path: Path) -> None:
    rows = [{"problems": "1?", "answer": "1"}]
    with pytest.raises(DataError, match="no column 'problem', did you mean 'problems'"):
        build("math", tmp_path, rows).problem(0, 0)
    with pytest.raises(ConfigError, match="no field 'solutions', did you mean 'solution'"):
        build("math", tmp_path, rows, columns={"solutions": "problems"})


def test_a_column_says_how_difficult_a_problem_is(tmp_path: Path) -> None:
    rows = [{"problem": "1 + 1?", "answer": "2", "level": 3}, {"problem": "1 + 2?", "answer": "3", "level": None}]
    task = build("math", tmp_path, rows, columns={"difficulty": "level"})
    assert [task.row(number).metadata.get("difficulty") for number in range(2)] == ["3", None]
