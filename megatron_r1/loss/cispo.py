"""CISPO: the importance weight is clipped instead of the update, so every token keeps its gradient."""

import torch
from pydantic import PositiveFloat

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.policy_gradient import PolicyGradient


class Cispo(PolicyGradient):
    """Minimises -J_CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5).

    Per token: ``-sg(clip(rho, 1 - eps, 1 + eps_high)) A logprob``, sg stopping the gradient: REINFORCE with a bounded
    importance weight. As in the paper there is no lower bound unless `clip_eps` is given, and every token of the
    minibatch has the same weight.
    """

    class Config(PolicyGradient.Config):
        """Keys of a `[loss]` section of this type."""

        clip_eps: PositiveFloat | None = None
        """Lower bound 1 - eps; None = none."""
        clip_eps_high: PositiveFloat = 4.0
        """Upper bound 1 + eps. The paper tunes it without naming a value; 5 as the largest weight is common."""

    config: Config

    def gain(
        self, logprobs: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `PolicyGradient.gain`."""
        assert inputs.advantages is not None
        ratio = log_ratio.detach().exp()
        low = self.config.clip_eps
        weight = ratio.clamp(0.0 if low is None else 1 - low, 1 + self.config.clip_eps_high)
        return weight * inputs.advantages * logprobs, ratio, weight != ratio
