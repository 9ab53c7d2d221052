"""DPO by hand: the loss, the gradient's coefficient as both papers print it, and its two variants."""

import math

import pytest
import torch

from megatron_r1.loss.dpo import Dpo
from megatron_r1.loss.sequences import SequenceInputs

LENGTHS = [2, 3]
LOGPROBS = [-1.0, -0.5, -2.0, -1.0, -0.25]
REFERENCE = [-2.0, -3.0]
"""Chosen: -1.5 under the policy, -2 under the reference. Rejected: -3.25 and -3."""


def inputs(loss: Dpo, lengths: list[int] = LENGTHS, reference: list[float] = REFERENCE) -> SequenceInputs:
    counts = torch.tensor(lengths)
    weights = torch.tensor(loss.token_weights(lengths)).repeat_interleave(counts)
    segments = torch.arange(len(lengths)).repeat_interleave(counts)
    return SequenceInputs(weights, segments, reference=torch.tensor(reference))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_one_pair_by_hand() -> None:
    loss = Dpo(beta=0.4)
    value, metrics = loss(torch.tensor(LOGPROBS), inputs(loss))
    chosen, rejected = 0.4 * 0.5, 0.4 * -0.25
    assert value.item() == pytest.approx(-math.log(sigmoid(chosen - rejected)), rel=1e-6)
    expected = {
        "accuracy": 1.0,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logp": -1.5,
        "rejected_logp": -3.25,
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)


def test_gradient_coefficient_of_the_paper() -> None:
    """arXiv 2305.18290, section 4: beta sigmoid(r_rejected - r_chosen), the same for every token of a response."""
    loss = Dpo(beta=0.4)
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    loss(logprobs, inputs(loss))[0].backward()
    coefficient = 0.4 * sigmoid(0.4 * -0.25 - 0.4 * 0.5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-coefficient] * 2 + [coefficient] * 3, rel=1e-6)


def test_length_normalised_divides_by_each_responses_length() -> None:
    """DeepSeekMath eq. 12 and, without its beta, eq. 14."""
    loss = Dpo(beta=4.0, length_normalised=True)
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    value, _ = loss(logprobs, inputs(loss))
    value.backward()
    chosen, rejected = 4 * 0.5 / 2, 4 * -0.25 / 3
    assert value.item() == pytest.approx(-math.log(sigmoid(chosen - rejected)), rel=1e-6)
    coefficient = 4 * sigmoid(rejected - chosen)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-coefficient / 2] * 2 + [coefficient / 3] * 3, rel=1e-6)


def test_label_smoothing_mixes_in_the_other_order() -> None:
    loss = Dpo(beta=0.4, label_smoothing=0.2)
    value, _ = loss(torch.tensor(LOGPROBS), inputs(loss))
    margin = 0.4 * 0.75
    assert value.item() == pytest.approx(-0.8 * math.log(sigmoid(margin)) - 0.2 * math.log(sigmoid(-margin)), rel=1e-6)


def test_at_the_reference_the_loss_is_log_two_whatever_the_lengths() -> None:
    loss = Dpo(beta=0.1)
    lengths = [1, 7, 5, 2]
    value, metrics = loss(torch.full((15,), -1.0), inputs(loss, lengths, [-1.0, -7.0, -5.0, -2.0]))
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(0.5)


def test_pairs_count_alike_in_any_cut() -> None:
    loss = Dpo(beta=0.3)
    lengths = [1, 7, 5, 2, 3, 3]
    logprobs = torch.randn(21, generator=torch.Generator().manual_seed(0))
    reference = [0.5, -1.0, 2.0, 0.0, 1.0, -2.0]
    whole = inputs(loss, lengths, reference)
    value, figures = loss(logprobs, whole)
    single = [loss(logprobs[a:b], inputs(loss, n, r)) for a, b, n, r in (
        (0, 8, [1, 7], reference[:2]), (8, 15, [5, 2], reference[2:4]), (15, 21, [3, 3], reference[4:]),
    )]  # fmt: skip
    assert value.item() == pytest.approx(sum(part.item() for part, _ in single) / 3, rel=1e-5)
    for name in figures:
        assert figures[name].item() == pytest.approx(sum(m[name].item() for _, m in single) / 3, rel=1e-5)
