import pytest

from megatron_r1.reward.format import well_formed
from megatron_r1.reward.response import extract_answer

GOOD = "<think>a</think> <answer>5</answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f" {GOOD}\n",
        "<think>\nlong\n\nreasoning < 3 and </b>\n</think>\n\n<answer>\n5\n</answer>",
        "<think>a</think><answer>5</answer>",
    ],
)
def test_well_formed(text: str) -> None:
    assert well_formed(text)
    assert extract_answer(text) == "5"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        f"so {GOOD}",
        f"{GOOD} so",
        f"{GOOD} {GOOD}",
        f"{GOOD}\nmore\n</answer>",
        "<think>a</think> so <answer>5</answer>",
        "<think> </think> <answer>5</answer>",
        "<think>a</think> <answer>\n</answer>",
        "<answer>5</answer> <think>a</think>",
        "<think>a</think> <answer>5",
        "<think>a <answer>5</answer>",
        "<think>a<think>b</think></think> <answer>5</answer>",
        "<think>a</think> <answer><answer>5</answer></answer>",
        "<think>a <answer>5</answer></think> <answer>5</answer>",
        "<THINK>a</THINK> <ANSWER>5</ANSWER>",
    ],
)
def test_malformed(text: str) -> None:
    assert not well_formed(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think> <answer>4</answer> <answer> 5 </answer>", "5"),
        ("<think><answer>4</answer></think> <answer>5</answer>", "5"),
        ("<think>a</think> <answer>5</answer> <think>b <answer>6</answer>", "5"),
        ("<think>a</think> <answer>5</answer> <answer>6", "5"),
        ("<think>a</think> <answer></answer>", ""),
        ("<answer>5</answer>", None),
        ("a</think> <answer>5</answer>", None),
        ("<think>a <answer>5</answer>", None),
        ("<think>a</think> 5", None),
    ],
)
def test_the_last_answer_after_a_closed_thought(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer
