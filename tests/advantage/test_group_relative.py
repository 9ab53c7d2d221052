"""Group-relative advantages against numbers worked by hand, numpy and TRL's formula."""

import sys

import numpy
import pytest

from megatron_r1.advantage.group_relative import GroupRelative
from megatron_r1.config.load import validate
from megatron_r1.types import Group, Question, Sample


def advantages(rewards: list[float], **config: object) -> list[float]:
    samples = [Sample([1], [0.0], "", True, 0, reward=reward) for reward in rewards]
    group = Group(Question("q", "task", "?", "!"), [1], samples)
    GroupRelative(validate(GroupRelative.Config, config, where="test"))([group])
    return [sample.advantages[0] for sample in samples]


def test_worked_by_hand() -> None:
    """r = 1, 0, 0, 0: mean 1/4, population std sqrt(3)/4, so A = sqrt(3) and -1/sqrt(3)."""
    assert advantages([1, 0, 0, 0]) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])


def test_population_std_gives_mean_zero_and_mean_square_one() -> None:
    values = numpy.array(advantages([2.0, 0.5, 1.0, 0.0, 2.0]))
    assert values.mean() == pytest.approx(0, abs=1e-12)
    assert (values**2).mean() == pytest.approx(1)


def test_sample_std_is_trls() -> None:
    rewards = [2.0, 0.0, 1.0, 1.0]
    expected = (numpy.array(rewards) - numpy.mean(rewards)) / (numpy.std(rewards, ddof=1) + 1e-4)
    assert advantages(rewards, std="sample", eps=1e-4) == pytest.approx(expected.tolist())


def test_without_std_is_dr_grpo() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0], std="none") == [0.5, -0.5, -0.5, 0.5]


def test_equal_rewards_teach_nothing() -> None:
    assert advantages([0.1 + 0.2] * 3) == [0.0] * 3
    assert advantages([1.0, 1.0], std="none") == [0.0, 0.0]


def test_no_torch() -> None:
    import subprocess

    code = "import sys, megatron_r1.advantage.group_relative; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
