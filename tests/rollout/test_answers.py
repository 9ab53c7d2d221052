from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from megatron_r1.rollout.answers import Answer, AnswerFile, digest, final_answer, to_answers
from megatron_r1.types import Group, Question, Sample

GOOD = Answer("<think>é\n</think>\u2028 4", 7, True, True, {"known": 1.0, "form": None}, "4")
CUT = Answer("half a \ud800", 3, False, None, {}, None)
BATCH = [[GOOD, CUT], [CUT, GOOD]]


def stored(path: Path) -> AnswerFile:
    with AnswerFile(path) as file:
        file.append("a", BATCH)
        file.append("b", BATCH[::-1])
    return file


def test_batches_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scored.jsonl"
    stored(path)
    with AnswerFile(path) as file:
        assert "a" in file
        assert "c" not in file
        file.append("c", [[GOOD]])
        assert file.read("c") == [[GOOD]]
        assert file.read("b")[1][0] == GOOD
        assert file.read("a")[0] == [GOOD, Answer("half a ?", 3, False, None, {}, None)]


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_batch_that_a_kill_cut_short_is_forgotten(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "scored.jsonl"
    stored(path)
    path.write_bytes(path.read_bytes()[:-lost])
    with AnswerFile(path) as file:
        assert "a" in file
        assert "b" not in file
        file.append("b", BATCH)
        assert file.read("b")[0][0] == GOOD
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ["{}", "[1]", "no JSON", '{"key": "a"}', ""])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scored.jsonl"
    stored(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"scored\.jsonl, line 3"):
        AnswerFile(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>is it 3?</think> <answer> 4 </answer>", "4"),
        ("<think></think> The answer is \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}"),
        ("<think>\\boxed{3}</think> first \\boxed{1}, so \\boxed{2}", "2"),
        ("<think></think><answer>$X + 1$.</answer>", "x+1"),
        ("<think></think><answer>１，０</answer>", "1,0"),
        ("<think></think> B ", "b"),
        ("<think>4</think> <answer></answer>", None),
        ("<think>4", None),
        ("4", None),
        ("", None),
    ],
)
def test_final_answer(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


def test_a_tag_that_the_template_opened_counts() -> None:
    sample = Sample([1, 2], [0.0, 0.0], "4?</think><answer>4</answer>", True, 0, {"known": 1.0}, 1.0, True)
    [answer] = to_answers(Group(Question("q", "math", "2 + 2 = <think>\n", "4"), [1], [sample]))
    assert answer == Answer(sample.text, 2, True, True, {"known": 1.0}, "4")


def test_digests_tell_settings_apart() -> None:
    assert digest({"a": 1, "b": [2]}, "x") == digest({"b": [2], "a": 1}, "x")
    assert len({digest(1), digest("1"), digest(1, None), digest([1])}) == 4
