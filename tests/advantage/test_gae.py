"""GAE against numbers worked by hand, against its definition as a sum, and at its two ends."""

import random
from typing import Any

import pytest

from megatron_r1.advantage.gae import Gae
from megatron_r1.config.load import validate
from megatron_r1.types import Group
from tests.advantage.groups import group


def build(**config: Any) -> Gae:
    return Gae(validate(Gae.Config, {"whiten": False, **config}, where="test"))


def valued(rewards: list[float], values: list[list[float]]) -> Group:
    made = group(rewards, [len(sample) for sample in values])
    for sample, said in zip(made.samples, values, strict=True):
        sample.values = said
    return made


def test_worked_by_hand() -> None:
    """V = 0.5, 1, reward 2 at the end, gamma 0.9, lambda 0.5.

    delta_1 = 2 - 1 = 1; delta_0 = 0.9 * 1 - 0.5 = 0.4; A_0 = 0.4 + 0.45 * 1 = 0.85. With lambda 1 for the critic:
    R_1 = 1 + 1 = 2, R_0 = 0.4 + 0.9 + 0.5 = 1.8 = 0.9 * 2.
    """
    made, estimate = valued([2.0], [[0.5, 1.0]]), build(gamma=0.9, lam=0.5)
    estimate([made])
    assert made.samples[0].advantages == pytest.approx([0.85, 1.0])
    assert estimate.returns([made])[0] == pytest.approx([1.8, 2.0])


def by_the_paper(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 16, the sum for every t anew."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** step * deltas[t + step] for step in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.5, 0.95)])
def test_equals_the_definition(gamma: float, lam: float) -> None:
    rng = random.Random(0)
    values = [[rng.gauss(0, 1) for _ in range(n)] for n in (1, 4, 9)]
    made = valued([rng.gauss(0, 1) for _ in values], values)
    made.samples[2].step_rewards = [(3, 0.5), (6, -1.0)]
    estimate = build(gamma=gamma, lam=lam, critic_lam=0.3)
    estimate([made])
    returns = estimate.returns([made])
    for sample, said, target in zip(made.samples, values, returns, strict=True):
        rewards = [0.0] * len(said)
        rewards[-1] = sample.reward
        for end, reward in sample.step_rewards:
            rewards[end] += reward
        assert sample.advantages == pytest.approx(by_the_paper(rewards, said, gamma, lam))
        expected = [a + v for a, v in zip(by_the_paper(rewards, said, gamma, 0.3), said, strict=True)]
        assert target == pytest.approx(expected)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    made = valued([1.5], [[1.5, 1.5, 1.5]])
    build(lam=0.95)([made])
    assert made.samples[0].advantages == pytest.approx([0.0] * 3)


def test_kl_is_paid_by_every_token() -> None:
    """beta 0.1; log pi_old - log ref = 0.5 and -1: rewards -0.05 and 2 + 0.1; values 0, gamma = lambda = 1."""
    made, estimate = valued([2.0], [[0.0, 0.0]]), build(kl_coef=0.1)
    made.samples[0].trainer_logprobs = [-0.5, -2.0]
    assert estimate.needs_ref_logprobs
    assert not build().needs_ref_logprobs
    estimate([made], [[-1.0, -1.0]])
    assert made.samples[0].advantages == pytest.approx([2.05, 2.1])
    assert estimate.returns([made], [[-1.0, -1.0]])[0] == pytest.approx([2.05, 2.1])


def test_whitening_is_over_all_tokens_and_leaves_the_returns() -> None:
    groups = [valued([1.0, 0.0], [[0.2], [0.1, 0.3, 0.3]]), valued([2.0], [[0.5, 0.7]])]
    white, plain = build(whiten=True), build()
    expected = plain.returns(groups)
    white(groups)
    tokens = [number for one in groups for sample in one.samples for number in sample.advantages]
    assert sum(tokens) == pytest.approx(0, abs=1e-12)
    assert sum(number**2 for number in tokens) / len(tokens) == pytest.approx(1)
    assert white.returns(groups) == expected


def test_whitening_equal_advantages_gives_zeros() -> None:
    made = valued([1.0, 1.0], [[0.0], [0.0]])
    build(whiten=True)([made])
    assert [sample.advantages for sample in made.samples] == [[0.0], [0.0]]
