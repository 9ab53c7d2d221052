"""Rollout figures against numbers worked by hand."""

import pytest

from megatron_r1.report.rollout_figures import constant_rewards, heldout_figures, rollout_figures, throughput, uniform
from megatron_r1.types import Group, Question, Sample


def sample(text: str, length: int, accuracy: float | None, finished: bool = True) -> Sample:
    rewards = {"accuracy": accuracy, "format": 1.0}
    reward = 1.0 + (accuracy or 0.0)
    correct = None if accuracy is None else accuracy >= 1.0
    return Sample([1] * length, [0.0] * length, text, finished, 0, rewards, reward, correct)


QUESTION = Question("q", "task", "?", "!")
GROUPS = [
    Group(QUESTION, [1], [sample("wait, check", 2, 1.0), sample("no", 4, 0.5)]),
    Group(QUESTION, [1], [sample("yes", 6, None), sample("yes", 8, None, finished=False)]),
]


def test_means_over_all_samples() -> None:
    figures = rollout_figures(GROUPS)
    assert figures["reward"] == pytest.approx((2 + 1.5 + 1 + 1) / 4)
    assert figures["reward/accuracy"] == pytest.approx((1.0 + 0.5) / 2)  # None does not count
    assert figures["accuracy"] == 0.5  # half right is not right
    assert figures["format"] == 1.0
    assert figures["response_length"] == 5.0
    assert figures["truncated"] == 0.25
    assert figures["reflective_words"] == 500.0  # two words in four responses
    assert figures["uniform_groups"] == 0.5


def test_names_of_an_evaluation() -> None:
    assert heldout_figures(GROUPS) == {
        "heldout_accuracy": 0.5,
        "heldout_format": 1.0,
        "heldout_reward": 1.375,
        "heldout_length": 5.0,
    }


def test_members_of_a_mixture() -> None:
    members = [("sums", 1.0), ("sums", 0.0), ("puzzles", 1.0), ("prose", None)]
    groups = [
        Group(Question("q", "task", "?", "!", {"member": name}), [1], [sample("x", 1, accuracy)])
        for name, accuracy in members
    ]
    figures = rollout_figures(groups)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert {name: value for name, value in figures.items() if name.startswith("accuracy/")} == {
        "accuracy/sums": 0.5,
        "accuracy/puzzles": 1.0,
    }
    assert heldout_figures(groups)["heldout_accuracy/sums"] == 0.5


def test_difficulties() -> None:
    """Of a mixture's members and by themselves; numbers as well as words."""
    kinds = [({"member": "sums", "difficulty": 3}, 1.0), ({"member": "sums", "difficulty": 0}, 0.0)]
    kinds += [({"difficulty": "hard"}, 0.0), ({}, 1.0)]
    groups = [Group(Question("q", "task", "?", "!", kind), [1], [sample("x", 1, score)]) for kind, score in kinds]
    figures = rollout_figures(groups)
    assert {name: value for name, value in figures.items() if name.startswith("accuracy")} == {
        "accuracy": 0.5,
        "accuracy/sums": 0.5,
        "accuracy/3": 1.0,
        "accuracy/0": 0.0,
        "accuracy/hard": 0.0,
    }


def test_parts_that_are_the_same_for_all_samples() -> None:
    """Format is 1 everywhere; accuracy differs, but not within the second group, where nobody judges it."""
    assert constant_rewards(GROUPS) == {"format": 1.0}
    assert rollout_figures(GROUPS)["constant_rewards"] == 1.0
    assert constant_rewards(GROUPS[1:]) == {"format": 1.0}
    assert [uniform(group) for group in GROUPS] == [False, True]


def test_throughput() -> None:
    assert throughput(GROUPS, seconds=4.0) == {"tokens_per_second": 5.0}
