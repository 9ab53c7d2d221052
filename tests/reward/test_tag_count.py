import pytest

from megatron_r1.config import component
from megatron_r1.types import Group, Question, Sample
from tests.reward.shape_samples import score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think> <answer>5</answer>", 1.0),
        ("<think>\na\n</think>\n<answer>\n5\n</answer>", 1.0),
        ("<think>a</think> 5", 0.5),
        ("<think>a", 0.25),
        ("5", 0.0),
        ("", 0.0),
        ("<think><think>a</think> <answer>5</answer>", 0.75),
        ("<think>a</think> <answer>5</answer> <answer>6</answer>", 0.5),
        ("</think>a<think>", 0.0),
        ("<answer>5</answer> <think>a</think>", 0.0),
        ("<think>a <answer>5</think></answer>", 0.5),
        ("<THINK>a</THINK>", 0.0),
    ],
)
def test_a_quarter_for_each_tag_in_its_place(text: str, expected: float) -> None:
    assert score("tag_count", text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\na\n</think>\n<answer>\n5\n</answer>", 1.0),
        ("<think>a</think> <answer>5</answer>", 0.0),  # it wants line breaks
        ("\n</answer> \n<answer>\n \n</think>\n <think>\n", 1.0),  # it does not look at the order
    ],
)
def test_open_r1(text: str, expected: float) -> None:
    assert score("tag_count", text, compatible="open-r1") == [expected]


def test_a_tag_that_the_template_wrote() -> None:
    prefilled = Group(Question("0", "none", "q <think>\n", "5"), [], [Sample([], [], "a</think>", True, 0)])
    assert component.build("reward", {"type": "tag_count"})(prefilled) == [0.5]
