"""Binary cross-entropy of a reward model on labelled responses."""

import torch
import torch.nn.functional as F

from megatron_r1.loss.base import LossInputs, Metrics
from megatron_r1.loss.sequences import SequenceInputs, rightness, sequence_weights


class Pointwise:
    """L = -mean [y log sigmoid(r) + (1 - y) log(1 - sigmoid(r))], y = 1 for a safe response.

    DeepSeek-R1 v2, section 3.1: the safety reward model is trained on labels safe / unsafe, not on pairs.
    """

    needs_reference = False

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Every response counts alike."""
        return sequence_weights(lengths)

    def __call__(self, scores: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss. `scores`: [sequences], at each one's last token."""
        assert isinstance(inputs, SequenceInputs)
        assert inputs.labels is not None
        losses = F.binary_cross_entropy_with_logits(scores, inputs.labels, reduction="none")
        loss = (inputs.weights * losses).sum()
        margin = (2 * inputs.labels - 1) * scores.detach()
        figures = {"accuracy": rightness(margin), "margin": margin}
        return loss, {
            "loss": loss.detach(),
            **{name: (inputs.weights * value).sum() for name, value in figures.items()},
        }
