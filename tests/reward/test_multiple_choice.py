import pytest

from megatron_r1.config import component
from megatron_r1.types import Group, Question, Sample

CHOICES = ["the Moon", "the Sun", "Mars", "a comet", "Venus"]


def scores(*answers: str, reference: str = "B", choices: list[str] | None = None) -> list[float | None]:
    reward = component.build("reward", {"type": "multiple_choice"})
    question = Question("0", "stem", "q", reference, {"choices": CHOICES if choices is None else choices})
    texts = [f"<think>a</think> <answer>{answer}</answer>" for answer in answers]
    result: list[float | None] = reward(Group(question, [], [Sample([], [], text, True, 0) for text in texts]))
    return result


@pytest.mark.parametrize(
    "answer",
    [
        "B", "b", "(B)", "(b)", "B.", "B)", "B:", "**B**", "[B]", "$B$", r"\boxed{B}", r"\boxed{\text{B}}",
        r"\boxed{(B)}", r"So it is \boxed{B}.", "B) the Sun", "B. The Sun.", "(B) the Sun", "B: the Sun",
        r"\boxed{B) the Sun}",
        "the Sun", "The Sun.", "**the sun**", "The answer is B.", "The answer is (B) the Sun", "Answer: B",
        "The answer is B because it is the largest.", "Option B", "The correct answer is option B.",
        r"\boxed{B} as I said: \boxed{B}",
    ],
)  # fmt: skip
def test_right(answer: str) -> None:
    assert scores(answer) == [1.0]
    assert scores(answer, reference="A") == [0.0]


@pytest.mark.parametrize(
    "answer", ["A", "C", "F", "5", "", "x", "Mars", "BB", "Bob", "B1", "The Sun sets", r"\boxed{}"]
)
def test_wrong(answer: str) -> None:
    assert scores(answer) == [0.0]


def test_more_than_four_options() -> None:
    choices = [str(number) for number in range(10)]
    assert scores("J", "(J)", "9", "I", "K", reference="J", choices=choices) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_options_with_the_same_text() -> None:
    assert scores("one", "A", "B", reference="A", choices=["one", "one"]) == [1.0, 1.0, 0.0]


def test_an_option_that_is_a_letter() -> None:
    assert scores("B", "A", reference="A", choices=["B", "A"]) == [0.0, 1.0]


@pytest.mark.parametrize("reference", ["", "F", "AB", "the Sun"])
def test_a_reference_that_is_no_letter_does_not_apply(reference: str) -> None:
    assert scores("B", reference=reference) == [None]


def test_without_options_it_does_not_apply() -> None:
    assert scores("B", choices=[]) == [None]
