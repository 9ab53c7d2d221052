"""Importance weights: what corrects a policy gradient for samples of another policy than the learner's.

A response comes from an engine: from older weights where sampling runs ahead of training, and always through another
program, which rounds otherwise. The gradient that the losses take is right for samples of pi_old, the learner's policy
at the beginning of the step. So each token's gain is multiplied by pi_old / pi_engine, bounded because such ratios have
no bound on their variance. The clipping around pi_old stays as it is: this is the decoupled objective (Hilton et al.,
arXiv 2110.00641; AReaL, arXiv 2505.24298, 5.2).

* ``token``, ``cap``: w_t = min(pi_old / pi_engine, C) of each token, truncated importance sampling (Ionides, J. Comput.
  Graph. Stat. 17, 2008; the rho_t of IMPALA, arXiv 1802.01561, eq. 1). It forgets that tokens before were sampled by
  another policy, too, and has little variance.
* ``sequence``, ``cap``: w = min(prod_t pi_old / pi_engine, C), the same for all tokens of a response: unbiased but for
  the cap, and of more variance the longer responses are.
* ``drop``: the weight is the ratio within [floor, cap] and 0 outside; for tokens that is IcePop (Ring-1T, arXiv
  2510.18855). What is dropped still counts in the mean over tokens, as there.
"""

import torch

from megatron_r1.config.asynchrony import CorrectionSection
from megatron_r1.loss.sequences import per_sequence

LARGEST_LOG_RATIO = 20.0
"""Beyond it a ratio is as good as infinite, and has no gradient; its exponential overflows float32 from 88 on."""


def importance_weights(
    log_ratio: torch.Tensor, segments: torch.Tensor, section: CorrectionSection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each token, and where a bound has changed it. `[tokens]` both

    Args:
        log_ratio: log pi_old - log pi_engine of each token, nats. [tokens]
        segments: index of the sequence that each token belongs to. [tokens]
        section: level and bounds.
    """
    if section.kind == "none":
        return torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)
    if section.kind == "sequence":
        log_ratio = per_sequence(log_ratio, segments)[segments]
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    if section.outside == "cap":
        return ratio.clamp(max=section.cap), ratio > section.cap
    outside = (ratio < section.floor) | (ratio > section.cap)
    return ratio.masked_fill(outside, 0.0), outside
