import random
import statistics
from itertools import combinations

import pytest

from megatron_r1.evaluate.estimators import difference, interval, majority, pass_at_k, pass_rate, standard_error
from megatron_r1.rollout.answers import Answer


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
        # What a judge failed at wins the vote for its answer, and that is as right as those like it that were judged.
        ([("4", True), ("4", None), ("4", None), ("5", False), ("5", False)], 1.0),
        ([("4", True), ("4", None), ("5", False), ("5", False), ("5", None)], 0.0),
        ([("4", None), ("4", None), ("5", False)], None),
        ([("4", True), ("4", None), ("5", None), ("5", None)], 1.0),
    ],
)
def test_majority(votes: list[tuple[str | None, bool | None]], expected: float | None) -> None:
    assert majority([answer(*vote) for vote in votes]) == (expected and pytest.approx(expected))


def test_standard_error() -> None:
    assert standard_error([0.0, 1.0, 0.0, 1.0]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert standard_error([0.5]) is None


def test_interval_of_yes_or_no_is_wilsons() -> None:
    """The textbook's 95 % interval of 8 out of 10: 0.490 to 0.943."""
    values = [1.0] * 8 + [0.0] * 2
    # The standard error here divides by n - 1, so it is worth 9 trials: Wilson of 0.8 with n = 9.
    n, z = 9, 1.959964
    centre, spread = (0.8 + z * z / (2 * n)), z * (0.16 / n + z * z / (4 * n * n)) ** 0.5
    low, high = interval(values) or (0.0, 0.0)
    assert low == pytest.approx((centre - spread) / (1 + z * z / n), abs=1e-6)
    assert high == pytest.approx((centre + spread) / (1 + z * z / n), abs=1e-6)


def test_interval_of_all_right_does_not_shrink_to_a_point() -> None:
    """The rule of Wilson for n of n: n / (n + z^2)."""
    low, high = interval([1.0] * 20) or (0.0, 0.0)
    assert [low, high] == pytest.approx([20 / (20 + 1.959964**2), 1.0])
    assert interval([1.0]) is None


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Questions of different difficulty, four answers each: 95 % of the intervals hold the mean difficulty."""
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        rates = []
        for _ in range(40):
            difficulty = rng.choice((0.1, 0.5, 0.9))
            rates.append(sum(rng.random() < difficulty for _ in range(4)) / 4)
        low, high = interval(rates) or (0.0, 0.0)
        covered += low <= 0.5 <= high
    assert 925 <= covered <= 975


def test_paired_difference_by_hand() -> None:
    mean, low, high = difference([0.0, 0.5, 1.0, 0.0], [1.0, 0.5, 1.0, 0.5]) or (0.0, 0.0, 0.0)
    changes = [1.0, 0.0, 0.0, 0.5]
    error = statistics.stdev(changes) / 2
    assert (mean, low, high) == pytest.approx((0.375, 0.375 - 1.959964 * error, 0.375 + 1.959964 * error))
    assert difference([1.0], [0.0]) is None
