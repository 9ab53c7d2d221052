"""Direct preference optimisation: a policy learns from pairs without a reward model."""

import torch
import torch.nn.functional as F

from megatron_r1.loss.base import LossInputs, Metrics
from megatron_r1.loss.sequences import SequenceInputs, in_pairs, per_sequence, rightness, sequence_weights


class Dpo:
    """L = -mean log sigmoid(r_chosen - r_rejected), r = beta log(pi(y|x) / pi_ref(y|x)) (arXiv 2305.18290, eq. 7).

    The gradient moves the log-probability of the chosen response by beta sigmoid(r_rejected - r_chosen), that of the
    rejected one by as much the other way.

    Args:
        beta: strength of the pull towards the reference.
        length_normalised: divide each response's log-ratio by its length (DeepSeekMath, arXiv 2402.03300, eq. 12).
        label_smoothing: epsilon; the loss is (1 - epsilon) L(pair) + epsilon L(pair the wrong way round).
    """

    needs_reference = True

    def __init__(self, beta: float, length_normalised: bool = False, label_smoothing: float = 0.0) -> None:
        self.beta, self.length_normalised, self.label_smoothing = beta, length_normalised, label_smoothing

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Every pair counts alike: the weights of its two responses' tokens add up to 1 / pairs."""
        return sequence_weights(lengths)

    def __call__(self, logprobs: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss. `logprobs`: [tokens], nats, of chosen, rejected, chosen, ..."""
        assert isinstance(inputs, SequenceInputs)
        assert inputs.reference is not None
        totals = per_sequence(logprobs, inputs.segments)
        rewards = self.beta * (totals - inputs.reference)
        if self.length_normalised:
            rewards = rewards / per_sequence(torch.ones_like(logprobs), inputs.segments)
        chosen, rejected = in_pairs(rewards)
        margin = chosen - rejected
        share = sum(in_pairs(per_sequence(inputs.weights, inputs.segments)))
        epsilon = self.label_smoothing
        losses = -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)
        loss = (share * losses).sum()
        logps = in_pairs(totals)
        figures = {
            "accuracy": rightness(margin),
            "margin": margin,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logp": logps[0],
            "rejected_logp": logps[1],
        }
        return loss, {
            "loss": loss.detach(),
            **{name: (share * value.detach()).sum() for name, value in figures.items()},
        }
