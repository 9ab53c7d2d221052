import pytest

from megatron_r1.config import component
from megatron_r1.types import Group, Question, Sample

OPEN_R1 = "<think>\na\n</think>\n<answer>\n5\n</answer>"


def scores(*texts: str, prompt: str = "q", **config: object) -> list[float | None]:
    reward = component.build("reward", {"type": "format", **config})
    samples = [Sample([], [], text, True, 0) for text in texts]
    result: list[float | None] = reward(Group(Question("0", "none", prompt, "5"), [], samples))
    return result


def test_one_score_a_sample() -> None:
    assert scores(" <think>a</think> <answer>5</answer>", "5") == [1.0, 0.0]


def test_reasoning_that_the_prompt_opens() -> None:
    assert scores("a</think> <answer>5</answer>", prompt="q <think>\n") == [1.0]
    assert scores("<think>a</think> <answer>5</answer>", prompt="q <think>\n") == [0.0]


def test_an_answer_without_tags() -> None:
    texts = ["<think>a</think> 5", "<think>a</think>", "<think> </think> 5", "5", "b <think>a</think> 5"]
    assert scores(*texts, answer_in="after_think") == [1.0, 0.0, 0.0, 0.0, 0.0]
    twice = ["<think>a</think> 5 <think>b</think> 6", "<think>a</think> <answer>5</answer>"]
    assert scores(*twice, answer_in="after_think") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        (OPEN_R1, 1.0, 1.0),
        ("<think>a</think> <answer>5</answer>", 1.0, 0.0),
        (f"{OPEN_R1}\nand more", 0.0, 1.0),
        (f"{OPEN_R1} and more", 0.0, 0.0),
        ("<think>\n\n</think>\n<answer>\n5\n</answer>", 0.0, 1.0),
        ("<think>\na\n</think>\n<answer>\n<answer>\n5\n</answer>", 0.0, 1.0),
        (f"so {OPEN_R1}", 0.0, 0.0),
    ],
)
def test_where_open_r1_differs(text: str, ours: float, theirs: float) -> None:
    assert (scores(text), scores(text, compatible="open-r1")) == ([ours], [theirs])
