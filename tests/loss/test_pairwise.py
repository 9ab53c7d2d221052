"""The Bradley-Terry loss by hand, and cut into microbatches."""

import math

import pytest
import torch

from megatron_r1.loss.pairwise import Pairwise
from megatron_r1.loss.sequences import SequenceInputs

LOSS = Pairwise()


def inputs(pairs: int, share: float | None = None) -> SequenceInputs:
    """Of `pairs` pairs, each sequence scored at one position; `share` = weight of a sequence, all alike by default."""
    weight = share if share is not None else LOSS.token_weights([1] * (2 * pairs))[0]
    return SequenceInputs(weights=torch.full((2 * pairs,), weight), segments=torch.arange(2 * pairs))


def test_two_pairs_by_hand() -> None:
    loss, metrics = LOSS(torch.tensor([2.0, 1.0, -1.0, 1.0]), inputs(2))
    # -log sigmoid(1) = log(1 + e^-1); -log sigmoid(-2) = log(1 + e^2)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2, rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(0.5)
    assert metrics["margin"].item() == pytest.approx((1 - 2) / 2)


def test_gradient_is_the_probability_of_the_wrong_order() -> None:
    scores = torch.tensor([0.3, 1.1], requires_grad=True)
    LOSS(scores, inputs(1))[0].backward()
    wrong = 1 / (1 + math.exp(0.3 - 1.1))  # P(rejected over chosen) = sigmoid(r_rejected - r_chosen)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-wrong, wrong], rel=1e-6)


def test_equal_scores_give_log_two_and_half_accuracy() -> None:
    loss, metrics = LOSS(torch.zeros(2), inputs(1))
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["accuracy"].item() == 0.5


def test_a_huge_margin_overflows_nothing() -> None:
    scores = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss, _ = LOSS(scores, inputs(1))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 1.0]


def test_parts_add_up_to_the_whole() -> None:
    scores = torch.randn(14, generator=torch.Generator().manual_seed(0))
    whole, figures = LOSS(scores, inputs(7))
    share = LOSS.token_weights([1] * 14)[0]
    parts = [LOSS(scores[start : start + 2 * n], inputs(n, share)) for start, n in ((0, 1), (2, 4), (10, 0), (10, 2))]
    assert sum(part for part, _ in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    for name, value in figures.items():
        assert sum(metrics[name] for _, metrics in parts).item() == pytest.approx(value.item(), rel=1e-6)
