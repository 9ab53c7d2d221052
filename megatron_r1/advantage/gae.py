"""Generalized advantage estimation: Schulman et al. (arXiv 1506.02438), eq. 16; what PPO trains on."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Annotated

from pydantic import Field, NonNegativeFloat

from megatron_r1.advantage.base import Advantage
from megatron_r1.config.section import Section
from megatron_r1.types import Group, Sample

Share = Annotated[float, Field(ge=0, le=1)]


class Gae(Advantage):
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V after the last token being 0.

    V_t is `sample.values[t]`, the critic's value before token t. r_t is 0 but at the last token, which gets the
    sample's `reward`, and at the ends of reasoning steps where `sample.step_rewards` has some; with `kl_coef` every
    token pays -kl_coef (log pi_old - log pi_ref) of it (DeepSeekMath, arXiv 2402.03300, eq. 2).

    The critic is trained towards R_t = A_t + V_t, computed with a lambda of its own (`critic_lam`): with the default 1
    that is what was really earned from token t on, whatever the critic believed.

    `whiten` brings the advantages of all tokens of a rollout to mean 0 and standard deviation 1, which PPO
    implementations commonly do. The returns are not touched by it.
    """

    class Config(Section):
        """Keys of an `[advantage]` section of this type."""

        gamma: Share = 1.0
        """Discount of later rewards; 1 for texts, where only the end is rewarded."""
        lam: Share = 1.0
        """lambda: 1 trusts the rewards (no bias, more variance), 0 the critic's next value."""
        critic_lam: Share = 1.0
        """lambda of the critic's targets."""
        kl_coef: NonNegativeFloat = 0.0
        """Penalty for leaving the reference, within the reward; 0 needs no reference."""
        whiten: bool = True

    config: Config
    needs_group = False
    needs_values = True

    @property
    def needs_ref_logprobs(self) -> bool:
        return self.config.kl_coef > 0

    def __call__(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> None:
        """Fill `advantages` of every sample from `reward`, `step_rewards`, `values` and the log-probabilities."""
        samples = [sample for group in groups for sample in group.samples]
        for sample, rewards in zip(samples, self._rewards(samples, ref_logprobs), strict=True):
            sample.advantages = generalized_advantages(rewards, _values(sample), self.config.gamma, self.config.lam)
        if self.config.whiten:
            _whiten(samples)

    def returns(self, groups: Sequence[Group], ref_logprobs: Sequence[Sequence[float]] = ()) -> list[list[float]]:
        """R_t of every sample, what the critic is trained towards. [samples][sampled]"""
        samples = [sample for group in groups for sample in group.samples]
        targets = []
        for sample, rewards in zip(samples, self._rewards(samples, ref_logprobs), strict=True):
            values = _values(sample)
            advantages = generalized_advantages(rewards, values, self.config.gamma, self.config.critic_lam)
            targets.append([a + v for a, v in zip(advantages, values, strict=True)])
        return targets

    def _rewards(self, samples: Sequence[Sample], ref_logprobs: Sequence[Sequence[float]]) -> Iterator[list[float]]:
        """r_t of every sample. [sampled]"""
        for number, sample in enumerate(samples):
            rewards = [0.0] * sample.length
            if self.config.kl_coef:
                assert sample.trainer_logprobs is not None
                pairs = zip(sample.trainer_logprobs, ref_logprobs[number], strict=True)
                rewards = [-self.config.kl_coef * (old - ref) for old, ref in pairs]
            for end, reward in sample.step_rewards:
                rewards[end] += reward
            rewards[-1] += sample.reward
            yield rewards


def generalized_advantages(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """A_t of one sample, from the last token back: A_t = delta_t + gamma lambda A_{t+1}. [sampled] each."""
    advantages = [0.0] * len(rewards)
    following, advantage = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
        advantages[t], following = advantage, values[t]
    return advantages


def _values(sample: Sample) -> list[float]:
    assert sample.values is not None, "an estimator with needs_values runs after the critic"
    return sample.values


def _whiten(samples: Sequence[Sample]) -> None:
    tokens = [advantage for sample in samples for advantage in sample.advantages]
    mean = fmean(tokens)
    deviation = math.sqrt(fmean((advantage - mean) ** 2 for advantage in tokens))
    for sample in samples:
        sample.advantages = [(a - mean) / deviation if deviation else 0.0 for a in sample.advantages]
