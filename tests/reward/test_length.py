import pytest

from tests.reward.shape_samples import sample, score


def test_short_right_answers_are_worth_most() -> None:
    group = [sample("", 10, True), sample("", 20, True), sample("", 30, True)]
    assert score("length", *group) == [0.5, 0.0, -0.5]


def test_wrong_answers_gain_nothing() -> None:
    group = [sample("", 10, False), sample("", 25, False), sample("", 30, True)]
    assert score("length", *group) == [0.0, -0.25, -0.5]


@pytest.mark.parametrize("correct", [True, False])
def test_one_length(correct: bool) -> None:
    assert score("length", sample("a", 9, correct)) == [0.0]
    assert score("length", sample("a", 9, correct), sample("bb", 9, True)) == [0.0, 0.0]


def test_an_answer_that_nothing_judged() -> None:
    group = [sample("", 10, True), sample("", 30, True), sample("", 500, None)]
    assert score("length", *group) == [0.5, -0.5, None]
    assert score("length", sample("", 3, None)) == [None]


def test_open_r1_counts_characters_and_trusts_what_it_cannot_judge() -> None:
    group = [sample("a" * 10, 7, None), sample("a" * 20, 7, False), sample("a" * 15, 7, True)]
    assert score("length", *group, compatible="open-r1") == [0.5, -0.5, 0.0]
