"""Binary cross-entropy of labelled responses by hand."""

import math

import pytest
import torch

from megatron_r1.loss.pointwise import Pointwise
from megatron_r1.loss.sequences import SequenceInputs

LOSS = Pointwise()


def inputs(labels: list[float]) -> SequenceInputs:
    weights = torch.tensor(LOSS.token_weights([1] * len(labels)))
    return SequenceInputs(weights, torch.arange(len(labels)), labels=torch.tensor(labels, dtype=torch.float32))


def test_three_labels_by_hand() -> None:
    loss, metrics = LOSS(torch.tensor([1.0, -2.0, 0.5]), inputs([1, 0, 0]))
    # safe at 1: log(1 + e^-1); unsafe at -2: log(1 + e^-2); unsafe at 0.5: log(1 + e^0.5)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(2 / 3)
    assert metrics["margin"].item() == pytest.approx((1 + 2 - 0.5) / 3)


def test_gradient_is_probability_minus_label() -> None:
    scores = torch.tensor([1.0, 1.0], requires_grad=True)
    LOSS(scores, inputs([1, 0]))[0].backward()
    probability = 1 / (1 + math.exp(-1))
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([(probability - 1) / 2, probability / 2], rel=1e-6)


def test_an_empty_microbatch_adds_nothing() -> None:
    empty = SequenceInputs(torch.empty(0), torch.empty(0, dtype=torch.long), labels=torch.empty(0))
    loss, metrics = LOSS(torch.empty(0, requires_grad=True), empty)
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in metrics.values())
