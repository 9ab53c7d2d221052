import statistics
from itertools import combinations

import pytest

from megatron_r1.evaluate.answers import Answer
from megatron_r1.evaluate.estimators import majority, pass_at_k, pass_rate, standard_error


def answer(final: str | None, correct: bool | None) -> Answer:
    return Answer("", 1, True, correct, {}, final)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(samples: int) -> None:
    for right in range(samples + 1):
        answers = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            expected = statistics.fmean(any(chosen) for chosen in combinations(answers, k))
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(1000, 3, 1) == pytest.approx(0.003)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [([True, False, None, False], 1 / 3), ([None, None], None), ([True], 1.0), ([], None)],
)
def test_pass_rate_leaves_out_what_is_not_judged(verdicts: list[bool | None], expected: float | None) -> None:
    assert pass_rate([answer("x", verdict) for verdict in verdicts]) == expected


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([("4", True), ("4", True), ("5", False)], 1.0),
        ([("5", False), ("5", False), ("4", True)], 0.0),
        ([("4", True), ("5", False)], 0.5),
        ([("4", True), ("5", False), ("6", False)], 1 / 3),
        ([("4", True), (None, False), (None, False)], 1.0),
        ([(None, False)], 0.0),
        ([], 0.0),
        ([("4", True), ("4", False), ("4", True), ("4", False)], 0.5),
    ],
)
def test_majority(votes: list[tuple[str | None, bool]], expected: float) -> None:
    assert majority([answer(*vote) for vote in votes]) == pytest.approx(expected)


def test_standard_error() -> None:
    assert standard_error([0.0, 1.0, 0.0, 1.0]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert standard_error([0.5]) is None
