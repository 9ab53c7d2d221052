"""GRPO: the clipped policy-gradient objective with a KL penalty towards a reference policy."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.section import Section
from megatron_r1.loss.base import LossInputs, Metrics


class Grpo:
    """Minimises -J_GRPO (DeepSeekMath eq. 3; DeepSeek-R1 eq. 1-2).

    Per token: ``-(min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL)``, with
    ``rho = exp(logprob - old_logprob)`` and the k3 estimate ``KL = exp(d) - d - 1``, ``d = ref_logprob - logprob``.

    `ratio = "token"` is DeepSeekMath's (and every public implementation's). `ratio = "sequence"` takes the
    ratio of whole outputs as R1 writes it, ``rho_i = exp(sum_t (logprob - old_logprob))``, shared by all tokens
    of the output; the KL term stays per token, because the exponential of a whole output's log-ratio overflows.

    `aggregate` says how tokens are averaged: "sequence" gives each output the same weight and each of its
    tokens 1/|o_i| of it (eq. 3); "token" gives every token of the minibatch the same weight (DAPO,
    arXiv 2503.14476); "constant" divides by `max_tokens` (Dr. GRPO, arXiv 2503.20783).
    """

    class Config(Section):
        """Keys of a `[loss]` section of this type."""

        clip_eps: PositiveFloat = 10.0
        """R1's value for its RL stages. The ratio is positive, so from 1 upwards only the upper bound binds."""
        clip_eps_high: PositiveFloat | None = None
        """Upper bound where it differs from the lower (DAPO's clip-higher)."""
        kl_coef: NonNegativeFloat = 0.001
        """beta; 0 computes no reference log-probabilities at all."""
        ratio: Literal["token", "sequence"] = "token"
        aggregate: Literal["sequence", "token", "constant"] = "sequence"
        max_tokens: PositiveInt | None = None
        """Divisor of `aggregate = "constant"`."""

        @model_validator(mode="after")
        def _complete(self) -> "Grpo.Config":
            if (self.aggregate == "constant") != (self.max_tokens is not None):
                raise ValueError('max_tokens goes with aggregate = "constant", and only with it')
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs_reference = config.kl_coef > 0

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Weight of a token of each output. [sequences]"""
        if self.config.aggregate == "token":
            return [1 / sum(lengths)] * len(lengths)
        if self.config.max_tokens is not None:
            return [1 / (len(lengths) * self.config.max_tokens)] * len(lengths)
        return [1 / (len(lengths) * length) for length in lengths]

    def __call__(self, logprobs: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss and of the metrics. `logprobs`: [tokens], nats."""
        assert inputs.advantages is not None
        assert inputs.old_logprobs is not None
        log_ratio = logprobs - inputs.old_logprobs
        if self.config.ratio == "sequence":
            totals = log_ratio.new_zeros(len(log_ratio)).index_add(0, inputs.segments, log_ratio)
            log_ratio = totals[inputs.segments]
        ratio = log_ratio.exp()
        high = self.config.clip_eps_high or self.config.clip_eps
        clipped = ratio.clamp(1 - self.config.clip_eps, 1 + high)
        gain = torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
        loss = -(inputs.weights * gain).sum()
        cut = (clipped * inputs.advantages < ratio * inputs.advantages).float()
        metrics = {"clip_fraction": (inputs.weights * cut).sum(), "ratio": (inputs.weights * ratio.detach()).sum()}
        if self.needs_reference:
            assert inputs.ref_logprobs is not None
            distance = inputs.ref_logprobs - logprobs
            kl = (inputs.weights * (distance.exp() - distance - 1)).sum()
            loss = loss + self.config.kl_coef * kl
            metrics["kl"] = kl.detach()
        return loss, metrics | {"loss": loss.detach()}
