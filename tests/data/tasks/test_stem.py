from pathlib import Path
from typing import Any

import pytest

from megatron_r1.errors import ConfigError, DataError
from tests.data.tasks.written import build

TEXTS = ["iron", "gold", "zinc"]
LISTED = "Which rusts?\n\nA. iron\nB. gold\nC. zinc"


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (TEXTS, "B"),
        (TEXTS, "(B)"),
        (TEXTS, "B."),
        (TEXTS, 1),
        (TEXTS, "gold"),
        ({"A": "iron", "B": "gold", "C": "zinc", "D": None}, "B"),
        ({"label": ["1", "2", "3"], "text": TEXTS}, "2"),
        ({"label": ["A", "B", "C"], "text": TEXTS}, "B"),
    ],
)
def test_shapes_of_choices_and_answers(choices: Any, answer: Any, tmp_path: Path) -> None:
    problem = build("stem", tmp_path, [{"question": "Which rusts?", "choices": choices, "answer": answer}]).row(0)
    assert problem.text == LISTED
    assert (problem.answer, problem.metadata["choices"]) == ("B", TEXTS)


def test_what_an_ambiguous_answer_means_can_be_said(tmp_path: Path) -> None:
    rows = [{"question": "Half of 2?", "choices": ["2", "0", "1"], "answer": "1"}]
    assert build("stem", tmp_path, rows).row(0).answer == "C"
    assert build("stem", tmp_path, rows, answer_is="text").row(0).answer == "C"
    assert build("stem", tmp_path, rows, answer_is="number").row(0).answer == "B"
    with pytest.raises(DataError, match=r"line 1: answer '1' is no label of an option; the options are \{'A': '2'"):
        build("stem", tmp_path, rows, answer_is="label").row(0)


def test_shuffled_options_keep_their_answer_and_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    rows = [{"question": f"Which is {n}?", "choices": ["right", "a", "b", "c"], "answer": 0} for n in range(400)]
    task = build("stem", tmp_path, rows, shuffle_choices=True)
    problems = [task.row(number) for number in range(400)]
    for problem in problems:
        assert f"\n{problem.answer}. right" in problem.text
        assert problem.metadata["choices"]["ABCD".index(problem.answer)] == "right"
    for letter in "ABCD":
        assert 60 < sum(problem.answer == letter for problem in problems) < 140  # 100; five deviations are 43
    assert {task.problem(seed, index).text for seed in (1, 2) for index in range(400)} == {p.text for p in problems}


def test_wrong_options_in_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"Question": f"{n}?", "Correct": "yes", "Wrong 1": "no", "Wrong 2": "maybe"} for n in range(50)]
    columns = {"question": "Question", "answer": "Correct"}
    task = build("stem", tmp_path, rows, columns=columns, distractors=["Wrong 1", "Wrong 2"])
    answers = {task.row(number).answer for number in range(50)}
    assert answers == {"A", "B", "C"}
    assert all(f"\n{problem.answer}. yes" in problem.text for problem in map(task.row, range(50)))
    with pytest.raises(ConfigError, match="the answer is a text, not a label"):
        build("stem", tmp_path, rows, columns=columns, distractors=["Wrong 1"], answer_is="label")


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (TEXTS, "D", "answer 'D' is no text of an option"),
        (TEXTS, 3, "answer 3 is no number"),
        (TEXTS, -1, "answer -1 is no number"),
        (TEXTS, True, "answer True is no"),
        (TEXTS, None, "answer None is no text"),
        (["iron"], 0, "1 options; 2 to 26"),
        ([str(n) for n in range(27)], 0, "27 options"),
        (["iron", "iron "], 0, "empty or the same"),
        (["iron", ""], 0, "empty or the same"),
        ({"label": ["A", "A"], "text": ["iron", "gold"]}, "A", "2 options with the labels"),
        ({"label": ["A"], "text": ["iron", "gold"]}, "A", "2 options with the labels"),
        ("iron, gold", 0, "a list or a table of options was expected"),
    ],
)
def test_bad_rows_are_named(choices: Any, answer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"stem\.jsonl, line 1: .*{message}"):
        build("stem", tmp_path, [{"question": "Which?", "choices": choices, "answer": answer}]).row(0)
