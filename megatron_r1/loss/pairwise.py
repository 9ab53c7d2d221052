"""The Bradley-Terry loss of a reward model on pairs."""

import torch
import torch.nn.functional as F

from megatron_r1.loss.base import LossInputs, Metrics
from megatron_r1.loss.sequences import in_pairs, per_sequence, rightness, sequence_weights


class Pairwise:
    """L = -mean log sigmoid(r(x, y_chosen) - r(x, y_rejected)) (Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""

    needs_reference = False

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Every pair counts alike: the weights of its two sequences add up to 1 / pairs."""
        return sequence_weights(lengths)

    def __call__(self, scores: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss. `scores`: [2 pairs], of chosen, rejected, chosen, ..."""
        chosen, rejected = in_pairs(scores)
        margin = chosen - rejected
        share = sum(in_pairs(per_sequence(inputs.weights, inputs.segments)))
        loss = -(share * F.logsigmoid(margin)).sum()
        metrics = {"accuracy": (share * rightness(margin)).sum(), "margin": (share * margin.detach()).sum()}
        return loss, {"loss": loss.detach(), **metrics}
