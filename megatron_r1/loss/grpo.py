"""GRPO: the clipped policy-gradient objective with a KL penalty towards a reference policy."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.importance import LARGEST_LOG_RATIO
from megatron_r1.loss.policy_gradient import PolicyGradient, clipped_gain
from megatron_r1.loss.sequences import per_sequence


class Grpo(PolicyGradient):
    """Minimises -J_GRPO (DeepSeekMath eq. 3; DeepSeek-R1 eq. 1-2).

    Per token: ``-(min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL)``, with
    ``rho = exp(logprob - old_logprob)`` and the k3 estimate ``KL = exp(d) - d - 1``, ``d = ref_logprob - logprob``.

    `ratio = "token"` is DeepSeekMath's (and every public implementation's). `ratio = "sequence"` takes the
    ratio of whole outputs as R1 writes it, ``rho_i = exp(sum_t (logprob - old_logprob))``, shared by all tokens
    of the output; the KL term stays per token, because the exponential of a whole output's log-ratio overflows.

    Variants by their keys:

    * DAPO (arXiv 2503.14476): ``clip_eps = 0.2, clip_eps_high = 0.28, kl_coef = 0, aggregate = "token"``, with the
      run's `dynamic_sampling` and the reward `soft_overlong_punishment`.
    * Dr. GRPO (arXiv 2503.20783): ``kl_coef = 0, aggregate = "constant", max_tokens = <the rollout's>``, with
      ``[advantage] std = "none"``.
    """

    class Config(PolicyGradient.Config):
        """Keys of a `[loss]` section of this type."""

        clip_eps: PositiveFloat = 10.0
        """R1's value for its RL stages. The ratio is positive, so from 1 upwards only the upper bound binds."""
        clip_eps_high: PositiveFloat | None = None
        """Upper bound where it differs from the lower (DAPO's clip-higher)."""
        kl_coef: NonNegativeFloat = 0.001
        ratio: Literal["token", "sequence"] = "token"
        aggregate: Literal["sequence", "token", "constant"] = "sequence"

    config: Config

    def gain(
        self, logprobs: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `PolicyGradient.gain`."""
        if self.config.ratio == "sequence":
            whole = per_sequence(log_ratio, inputs.segments)[inputs.segments]
            log_ratio = whole.clamp(max=LARGEST_LOG_RATIO)
        low = self.config.clip_eps
        return clipped_gain(log_ratio.exp(), inputs, low, self.config.clip_eps_high or low)
