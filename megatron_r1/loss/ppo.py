"""PPO: the policy's half of it; the critic's is `value.py`."""

import torch
from pydantic import PositiveFloat

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.policy_gradient import PolicyGradient, clipped_gain


class Ppo(PolicyGradient):
    """Minimises -J_PPO (Schulman et al., arXiv 1707.06347, eq. 7; DeepSeekMath, arXiv 2402.03300, eq. 1).

    Per token: ``-min(rho A, clip(rho, 1 - eps, 1 + eps) A)``, ``rho = exp(logprob - old_logprob)``. The advantages are
    those of `[advantage] type = "gae"`, one a token. A KL penalty belongs into the reward there
    (``advantage.kl_coef``); `kl_coef` here is GRPO's, beside the gain.
    """

    class Config(PolicyGradient.Config):
        """Keys of a `[loss]` section of this type."""

        clip_eps: PositiveFloat = 0.2

    config: Config

    def gain(
        self, logprobs: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `PolicyGradient.gain`."""
        return clipped_gain(log_ratio.exp(), inputs, self.config.clip_eps, self.config.clip_eps)
