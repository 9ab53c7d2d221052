"""Process supervision against numbers worked by hand from DeepSeekMath 4.1.3."""

import pytest

from megatron_r1.advantage.process import Process
from megatron_r1.types import Group
from tests.advantage.groups import group


def estimated(steps: list[list[tuple[int, float]]], lengths: list[int]) -> list[list[float]]:
    made: Group = group([9.0] * len(steps), lengths)
    for sample, rewards in zip(made.samples, steps, strict=True):
        sample.step_rewards = rewards
    Process(Process.Config())([made])
    return [sample.advantages for sample in made.samples]


def test_worked_by_hand() -> None:
    """R = {1, 0, 0, 1}: mean 1/2, std 1/2, so r~ = 1, -1, -1, 1.

    The first response has steps that end at tokens 1 and 3 of five: tokens 0, 1 answer for both (1 - 1 = 0), tokens 2,
    3 for the second (-1), token 4 for none. The second has steps that end at 0 and 2 of three: -1 + 1 = 0, then 1, 1.
    """
    found = estimated([[(1, 1.0), (3, 0.0)], [(0, 0.0), (2, 1.0)]], [5, 3])
    assert found == [[0.0, 0.0, -1.0, -1.0, 0.0], [0.0, 1.0, 1.0]]


def test_all_steps_of_the_group_are_normalised_together() -> None:
    """R = {0, 0, 3}: mean 1, std sqrt 2; a response with more steps weighs more in both."""
    found = estimated([[(0, 0.0), (1, 0.0)], [(0, 3.0)]], [2, 1])
    low, high = -1 / 2**0.5, 2 / 2**0.5
    assert found[0] == pytest.approx([2 * low, low])
    assert found[1] == pytest.approx([high])


def test_equals_the_sum_as_written() -> None:
    steps = [[(0, 0.1), (4, 0.7), (5, -0.2)], [(2, 0.4)], []]
    lengths = [7, 4, 2]
    rewards = [reward for sample in steps for _, reward in sample]
    mean = sum(rewards) / 4
    std = (sum((r - mean) ** 2 for r in rewards) / 4) ** 0.5
    expected = [
        [sum((r - mean) / std for end, r in sample if end >= t) for t in range(n)]
        for sample, n in zip(steps, lengths, strict=True)
    ]
    for ours, by_hand in zip(estimated(steps, lengths), expected, strict=True):
        assert ours == pytest.approx(by_hand)


@pytest.mark.parametrize("steps", [[[], []], [[(0, 2.0)], [(1, 2.0)]]], ids=["none", "equal"])
def test_nothing_to_compare_teaches_nothing(steps: list[list[tuple[int, float]]]) -> None:
    assert estimated(steps, [2, 2]) == [[0.0, 0.0], [0.0, 0.0]]
