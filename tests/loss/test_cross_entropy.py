"""Cross-entropy: -log p of the label, mean over tokens; the loss, and Megatron's in one process and in two."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.cross_entropy import CrossEntropy
from tests.loss.vocab_parallel import TwoRanks

LOGITS = st.floats(-15, 15, width=32)
FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    """Logits `[tokens][vocab]`, the vocabulary an even number, and a label for each token."""
    tokens, half = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    row = st.lists(LOGITS, min_size=2 * half, max_size=2 * half)
    logits = draw(st.lists(row, min_size=tokens, max_size=tokens))
    return logits, [draw(st.integers(0, 2 * half - 1)) for _ in range(tokens)]


def negative_log(logits: list[float], label: int) -> float:
    """-log p of the label in double precision, as it is defined."""
    top = max(logits)
    return math.log(sum(math.exp(z - top) for z in logits)) - (logits[label] - top)


@FEW
@given(table=tables())
def test_two_processes_with_half_the_vocabulary_each_give_minus_log_p(
    two_ranks: TwoRanks, table: tuple[list[list[float]], list[int]]
) -> None:
    """What a policy's log-probabilities come from, value and gradient."""
    logits, labels = table
    losses, gradient = two_ranks.cross_entropy(logits, labels)
    expected = [negative_log(row, label) for row, label in zip(logits, labels, strict=True)]
    assert losses == pytest.approx(expected, rel=1e-5, abs=2e-6)
    alone = torch.tensor(logits, requires_grad=True)
    F.cross_entropy(alone, torch.tensor(labels)).backward()
    assert alone.grad is not None
    torch.testing.assert_close(torch.tensor(gradient), alone.grad, atol=1e-6, rtol=1e-4)


@given(table=tables(), cut=st.integers(0, 5))
def test_the_loss_is_the_mean_over_tokens_however_they_are_packed(
    table: tuple[list[list[float]], list[int]], cut: int
) -> None:
    """Two sequences in two microbatches; never negative."""
    logits, labels = table
    logprobs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    logprobs = logprobs.gather(1, torch.tensor(labels)[:, None])[:, 0]
    parts = [part for part in (logprobs[:cut], logprobs[cut:]) if len(part)]
    loss = CrossEntropy()
    weights = loss.token_weights([len(part) for part in parts])
    total = 0.0
    for part, weight in zip(parts, weights, strict=True):
        inputs = LossInputs(torch.full((len(part),), weight, dtype=torch.float64), torch.zeros(len(part)).long())
        value, metrics = loss(part, inputs)
        assert metrics["loss"] == value
        total += value.item()
    expected = sum(negative_log(row, label) for row, label in zip(logits, labels, strict=True)) / len(labels)
    assert total == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert total >= 0


def test_equals_torch() -> None:
    logits, labels = torch.randn(11, 7), torch.randint(7, (11,))
    logprobs = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    loss = CrossEntropy()
    weights = torch.tensor(loss.token_weights([4, 7])).repeat_interleave(torch.tensor([4, 7]))
    value, metrics = loss(logprobs, LossInputs(weights, torch.zeros(11, dtype=torch.long)))
    torch.testing.assert_close(value, F.cross_entropy(logits, labels))
    torch.testing.assert_close(metrics["loss"], value)
