"""Objectives over whole sequences: what their microbatches hold besides per-token data."""

from dataclasses import dataclass

import torch

from megatron_r1.loss.base import LossInputs

ROUNDING = 1e-5
"""Margins below this are those of one text laid out in two ways."""


@dataclass
class SequenceInputs(LossInputs):
    """`LossInputs` of a microbatch whose sequences are judged as wholes; a pair is chosen, then rejected.

    The weights of a sequence's tokens add up to its share in the loss.
    """

    labels: torch.Tensor | None = None
    """1 = good, 0 = bad. [sequences]"""
    reference: torch.Tensor | None = None
    """Sum of the log-probabilities of each response under the reference policy, nats. [sequences]"""


def sequence_weights(lengths: list[int]) -> list[float]:
    """Weight of a token of each sequence when every sequence counts alike. [sequences]"""
    return [1 / (len(lengths) * length) for length in lengths]


def per_sequence(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Sum of `values` `[tokens]` over each sequence. [sequences]"""
    count = int(segments[-1]) + 1 if segments.numel() else 0
    return values.new_zeros(count).index_add(0, segments, values)


def in_pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the chosen and those of the rejected sequences. `[2 pairs]` -> `[pairs]`, `[pairs]`"""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def rightness(margin: torch.Tensor) -> torch.Tensor:
    """1 where the margin is on the right side, 0 where on the wrong, 1/2 where it is no more than rounding. [items]"""
    margin = margin.detach()
    return (margin.sign() * (margin.abs() > ROUNDING) + 1) / 2
