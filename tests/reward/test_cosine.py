import math

import pytest

from tests.reward.shape_samples import sample, score


@pytest.mark.parametrize(
    ("correct", "tokens", "expected"),
    [
        (True, 0, 1.0),
        (True, 50, 0.75),
        (True, 100, 0.5),
        (True, 250, 0.5),
        (True, 25, 0.5 + 0.25 * (1 + math.sqrt(0.5))),
        (False, 0, -1.0),
        (False, 50, -0.75),
        (False, 100, -0.5),
        (False, 200, -0.5),
        (None, 10, None),
    ],
)
def test_half_a_cosine(correct: bool | None, tokens: int, expected: float | None) -> None:
    [value] = score("cosine", sample("", tokens, correct), max_length=100)
    assert value == (None if expected is None else pytest.approx(expected))


def test_characters() -> None:
    assert score("cosine", sample("x" * 50, 7, True), max_length=100, unit="characters") == [pytest.approx(0.75)]


def test_a_response_that_was_cut() -> None:
    samples = [sample("", 100, correct, finished=False) for correct in (True, False, None)]
    assert score("cosine", *samples, max_length=100, cut=-2.0) == [-2.0, -2.0, None]
    assert score("cosine", *samples, max_length=100) == [pytest.approx(0.5), pytest.approx(-0.5), None]


@pytest.mark.parametrize(
    ("correct", "characters", "expected"),
    [
        (True, 0, 1.0),
        (True, 1000, 0.5),
        (True, 2000, 1.0),  # it is not cut at the maximum
        (False, 0, 0.0),  # its scripts pay short wrong answers more than long ones
        (False, 1000, -0.5),
        (None, 300, 1.0),
    ],
)
def test_open_r1(correct: bool | None, characters: int, expected: float) -> None:
    [value] = score("cosine", sample("x" * characters, 3, correct), compatible="open-r1")
    assert value == pytest.approx(expected)


def test_open_r1_with_values_of_ones_own() -> None:
    wrong = sample("", 0, False)
    assert score("cosine", wrong, compatible="open-r1", wrong_short=-1.0) == [-1.0]
