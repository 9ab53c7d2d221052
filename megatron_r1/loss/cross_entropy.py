"""Next-token cross-entropy, averaged over the tokens of the global batch."""

import torch

from megatron_r1.loss.base import LossInputs, Metrics


class CrossEntropy:
    """L = -1/N sum_t log p(x_t | x_<t), N being all tokens of the batch that count."""

    needs_reference = False

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Every token counts alike."""
        return [1 / sum(lengths)] * len(lengths)

    def __call__(self, logprobs: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """Weighted negative log-likelihood."""
        loss = -(inputs.weights * logprobs).sum()
        return loss, {"loss": loss.detach()}
