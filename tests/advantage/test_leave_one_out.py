"""Leave-one-out advantages against numbers worked by hand."""

import pytest

from megatron_r1.advantage.group_relative import GroupRelative
from megatron_r1.advantage.leave_one_out import LeaveOneOut
from tests.advantage.groups import group


def test_worked_by_hand() -> None:
    """r = 3, 0, 0: the others' means are 0, 1.5, 1.5. Every token of a response gets the same."""
    made = group([3.0, 0.0, 0.0], lengths=[1, 2, 3])
    LeaveOneOut(LeaveOneOut.Config())([made])
    assert [sample.advantages for sample in made.samples] == [[3.0], [-1.5, -1.5], [-1.5, -1.5, -1.5]]


def test_is_dr_grpo_but_for_a_factor() -> None:
    rewards = [0.3, 1.7, 0.9, 2.0]
    one, other = group(rewards), group(rewards)
    LeaveOneOut(LeaveOneOut.Config())([one])
    GroupRelative(GroupRelative.Config(std="none"))([other])
    ours = [sample.advantages[0] for sample in one.samples]
    assert ours == pytest.approx([4 / 3 * sample.advantages[0] for sample in other.samples])


def test_equal_rewards_teach_exactly_nothing() -> None:
    made = group([0.1 + 0.2] * 7)
    LeaveOneOut(LeaveOneOut.Config())([made])
    assert {number for sample in made.samples for number in sample.advantages} == {0.0}
