"""What the policy-gradient objectives share: how tokens are averaged, and the KL penalty beside the gain."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator

from megatron_r1.config.section import Section
from megatron_r1.loss.base import LossInputs, Metrics


class PolicyGradient(ABC):
    """Minimises ``-sum_t w_t (gain_t - beta KL_t)``; a subclass says what a token gains.

    KL is the k3 estimate towards the reference (DeepSeekMath, arXiv 2402.03300, eq. 4). `aggregate` says how tokens
    are averaged: "sequence" gives each output the same weight and each of its tokens 1/|o_i| of it (DeepSeekMath
    eq. 3); "token" gives every token of the minibatch the same weight (DAPO, arXiv 2503.14476); "constant" divides by
    `max_tokens` (Dr. GRPO, arXiv 2503.20783).
    """

    class Config(Section):
        """Keys that every [loss] of this kind has."""

        kl_coef: NonNegativeFloat = 0.0
        """beta; 0 computes no reference log-probabilities at all."""
        aggregate: Literal["sequence", "token", "constant"] = "token"
        max_tokens: PositiveInt | None = None
        """Divisor of `aggregate = "constant"`."""

        @model_validator(mode="after")
        def _complete(self) -> "PolicyGradient.Config":
            if (self.aggregate == "constant") != (self.max_tokens is not None):
                raise ValueError('max_tokens goes with aggregate = "constant", and only with it')
            return self

    def __init__(self, config: Any) -> None:
        self.config = config
        self.needs_reference = config.kl_coef > 0

    @abstractmethod
    def gain(
        self, logprobs: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each token adds to the objective, the ratio it does so with, and whether that is clipped. `[tokens]`

        Args:
            logprobs: of the policy, nats. [tokens]
            log_ratio: `logprobs` less those of the policy that sampled. [tokens]
            inputs: with `advantages`.
        """

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Weight of a token of each output. [sequences]"""
        if self.config.aggregate == "token":
            return [1 / sum(lengths)] * len(lengths)
        if self.config.max_tokens is not None:
            return [1 / (len(lengths) * self.config.max_tokens)] * len(lengths)
        return [1 / (len(lengths) * length) for length in lengths]

    def __call__(self, logprobs: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss and of the metrics. `logprobs`: [tokens], nats."""
        assert inputs.old_logprobs is not None
        gain, ratio, cut = self.gain(logprobs, logprobs - inputs.old_logprobs, inputs)
        weights = inputs.weights
        loss = -(weights * (gain if inputs.importance is None else inputs.importance * gain)).sum()
        metrics = {"clip_fraction": (weights * cut.float()).sum(), "ratio": (weights * ratio.detach()).sum()}
        if self.needs_reference:
            assert inputs.ref_logprobs is not None
            kl = (weights * k3(logprobs, inputs.ref_logprobs)).sum()
            loss = loss + self.config.kl_coef * kl
            metrics["kl"] = kl.detach()
        return loss, metrics | {"loss": loss.detach()}


def clipped_gain(
    ratio: torch.Tensor, inputs: LossInputs, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO's min(rho A, clip(rho, 1 - low, 1 + high) A), with the ratio and where the clip binds. `[tokens]`"""
    assert inputs.advantages is not None
    free = ratio * inputs.advantages
    clipped = ratio.clamp(1 - low, 1 + high) * inputs.advantages
    return torch.minimum(free, clipped), ratio, clipped < free


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi: never negative, and the KL(pi || pi_ref) on average over pi."""
    distance = ref_logprobs - logprobs
    return distance.exp() - distance - 1
