"""GSPO: the clipped objective with the ratio of whole responses, normalised by their length."""

from typing import Literal

import torch
from pydantic import PositiveFloat

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.policy_gradient import PolicyGradient, clipped_gain
from megatron_r1.loss.sequences import per_sequence


class Gspo(PolicyGradient):
    """Minimises -J_GSPO (Zheng et al., arXiv 2507.18071, eq. 5 and 7).

    ``J = 1/G sum_i min(s_i A_i, clip(s_i, 1 - eps, 1 + eps) A_i)`` with
    ``s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|) = exp(1/|o_i| sum_t (logprob - old_logprob))``: the geometric mean of the
    token ratios, which moves far less than a token's, hence the narrow bounds. Where the tokens of a response have
    different advantages each is taken with the response's ratio.
    """

    class Config(PolicyGradient.Config):
        """Keys of a `[loss]` section of this type."""

        clip_eps: PositiveFloat = 3e-4
        """The paper's (section 5.1), as the next."""
        clip_eps_high: PositiveFloat = 4e-4
        aggregate: Literal["sequence", "token", "constant"] = "sequence"

    config: Config

    def gain(
        self, logprobs: torch.Tensor, log_ratio: torch.Tensor, inputs: LossInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `PolicyGradient.gain`."""
        lengths = per_sequence(torch.ones_like(log_ratio), inputs.segments)
        ratios = (per_sequence(log_ratio, inputs.segments) / lengths).exp()
        return clipped_gain(ratios[inputs.segments], inputs, self.config.clip_eps, self.config.clip_eps_high)
