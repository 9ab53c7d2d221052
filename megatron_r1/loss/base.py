"""What an objective is: weights for the tokens of a global minibatch, then a sum over each microbatch."""

from dataclasses import dataclass
from typing import Protocol

import torch

Metrics = dict[str, torch.Tensor]
"""Name -> detached scalar. Values add up over microbatches and ranks to the minibatch's figure."""


@dataclass
class LossInputs:
    """Per-token data of one microbatch; all tensors are `[tokens]`, on the positions that count."""

    weights: torch.Tensor
    """Share of each token in the loss; sums to 1 over the whole minibatch for a mean."""
    segments: torch.Tensor
    """Index of the sequence that each token belongs to, from 0."""
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    """Log-probabilities under the policy that generated the rollout, by the trainer's own forward pass."""
    ref_logprobs: torch.Tensor | None = None
    old_values: torch.Tensor | None = None
    """What the critic said before each token when the rollout came in."""
    returns: torch.Tensor | None = None
    """What the critic should have said."""
    importance: torch.Tensor | None = None
    """Weight of each token's gain for having been sampled by another policy than that of `old_logprobs`
    (`importance.py`); None = 1."""


class Loss(Protocol):
    """An objective to minimise."""

    needs_reference: bool
    """Whether `ref_logprobs` must be there."""

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Weight of each token of every sequence of a global minibatch, from the sequences' lengths. [sequences]"""
        ...

    def __call__(self, outputs: torch.Tensor, inputs: LossInputs, /) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss, from the model's log-probabilities (or values) `[tokens]`."""
        ...
