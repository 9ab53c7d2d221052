import pytest

from megatron_r1.config import component
from megatron_r1.errors import ConfigError
from megatron_r1.types import Group, Question, Sample

ENTRY = {"question": "20 + 22 =", "answer": "42", "metadata": {}}
SUM = Question("0", "reasoning_gym", "20 + 22 =", "42", {"config": {"dataset": "chain_sum"}, "entry": ENTRY})


def scores(question: Question, *answers: str, **config: object) -> list[float | None]:
    reward = component.build("reward", {"type": "accuracy", **config})
    texts = [f" <think>a</think> <answer>{answer}</answer>" for answer in answers]
    result: list[float | None] = reward(Group(question, [], [Sample([], [], text, True, 0) for text in texts]))
    return result


def test_the_tasks_own_verifier() -> None:
    assert scores(SUM, "42", " 42.0 ", "+042", "41", "", "forty") == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_partial_credit_only_on_request() -> None:
    assert scores(SUM, "it is 42") == [0.0]
    [partial] = scores(SUM, "it is 42", partial_credit=True)
    assert partial is not None
    assert 0 < partial < 1


def test_only_answers_in_tags_count() -> None:
    reward = component.build("reward", {"type": "accuracy"})
    assert reward(Group(SUM, [], [Sample([], [], "42", True, 0)])) == [0.0]


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("42", ["42", "$42$", r"\boxed{42}", "42.0"], ["41", "", "x"]),
        (r"\frac{1}{2}", ["1/2", "0.5", r"$\frac{2}{4}$", r"\frac12"], ["2", r"\frac{1}{3}"]),
        (r"$x^2 + 2x + 1$", ["$(x+1)^2$"], ["$x^2$"]),
    ],
)
def test_math_verify(reference: str, right: list[str], wrong: list[str]) -> None:
    question = Question("0", "none", "q", reference)
    assert scores(question, *right, verifier="math_verify") == [1.0] * len(right)
    assert scores(question, *wrong, verifier="math_verify") == [0.0] * len(wrong)


def test_a_reference_that_is_no_mathematics_does_not_apply() -> None:
    question = Question("0", "none", "q", "the red one")
    assert scores(question, "the red one", verifier="math_verify") == [None]


def test_unknown_verifier() -> None:
    with pytest.raises(ConfigError, match=r"verifier: .*'task' or 'math_verify'"):
        scores(SUM, "42", verifier="mathverify")
