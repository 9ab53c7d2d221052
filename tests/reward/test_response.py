import pytest

from megatron_r1.reward.format import well_formed
from megatron_r1.reward.response import extract_answer, response, scored_part, split_reasoning
from megatron_r1.types import Question, Sample

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
        ("<think>a</think> so <answer> 5 </answer>, yes", "5"),
        ("<think>a</think> <answer>4</answer> <answer> 5 </answer>", None),
        ("<think><answer>4</answer></think> <answer>5</answer>", "5"),
        ("<think>a</think> <answer>5</answer> <think>b <answer>6</answer>", None),
        ("<think>a</think> <answer>5</answer> <answer>6", None),
        ("<think>a</think> <answer>5 </think> 6</answer>", None),
        ("<think>a</think> <answer></answer>", ""),
        ("<answer>5</answer>", None),
        ("a</think> <answer>5</answer>", None),
        ("<think>a <answer>5</answer>", None),
        ("<think>a</think> 5", None),
    ],
)
def test_the_one_answer_after_a_closed_thought(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think> It is 5.\n", "It is 5."),
        ("b <think>a</think> 5", "5"),
        ("<think>a</think> 4 <think>b</think> 5", None),
        ("<think>a</think> 4 </think> 5", None),
        ("<think>a</think> ", None),
        ("<think>a 5", None),
        ("5", None),
    ],
)
def test_an_answer_without_tags(text: str, answer: str | None) -> None:
    assert extract_answer(text, "after_think") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 5.\n", "It is 5."),
        ("<think>a</think> 5", "5"),
        ("<think>a 5", None),
        ("a</think> 5", None),
        ("", None),
    ],
)
def test_an_answer_of_a_model_that_does_not_think_in_tags(text: str, answer: str | None) -> None:
    assert extract_answer(text, "anywhere") == answer


def test_the_reasoning_ends_where_it_first_closes() -> None:
    assert split_reasoning("<think>a</think> b</think> c") == ("a", " b</think> c")
    assert split_reasoning("<think>a <think>b</think> c") == ("a <think>b", " c")
    assert split_reasoning("<think>a") == ("a", None)
    assert split_reasoning("a</think> b") == (None, None)


def test_a_prompt_that_opens_the_reasoning() -> None:
    sample = Sample([], [], "a</think> 5", True, 0)
    assert response(Question("0", "t", "q <think>\n", "5"), sample) == "<think>a</think> 5"
    assert response(Question("0", "t", "q", "5"), sample) == "a</think> 5"


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("<think>a</think>  Four.\n", "Four."),
        ("a</think>Four.", "Four."),  # the template has opened the reasoning
        ("<think>a</think>Four</think>.", "Four</think>."),
        ("  Four. ", "Four."),
        ("<think>a</think> ", ""),
        (" <think>a Four.", ""),
        ("", ""),
    ],
)
def test_scored_part(text: str, summary: str) -> None:
    assert scored_part(text, "summary") == summary
    assert scored_part(text, "response") == text.strip()
