"""The KL penalty's properties, on the function that the policy-gradient losses call.

Its mean over the policy's own distribution is the exact KL(pi || pi_ref): E_pi[pi_ref / pi - 1] = 0.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_r1.loss.policy_gradient import k3
from tests.loss.vocab_parallel import TwoRanks

LOGPROBS = st.floats(-12, 0)
LOGITS = st.lists(st.floats(-6, 6), min_size=3, max_size=3)


def double(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def expected_k3(policy: list[float], reference: list[float]) -> float:
    """sum_v pi(v) k3(v): what the penalty is on average over tokens sampled from the policy. Logits in."""
    ours, theirs = torch.log_softmax(double(policy), -1), torch.log_softmax(double(reference), -1)
    return float((ours.exp() * k3(ours, theirs)).sum())


def exact_kl(policy: list[float], reference: list[float]) -> float:
    """sum_v pi(v) log(pi(v) / pi_ref(v)), as it is defined."""

    def probabilities(logits: list[float]) -> list[float]:
        total = sum(math.exp(z) for z in logits)
        return [math.exp(z) / total for z in logits]

    return sum(p * math.log(p / q) for p, q in zip(probabilities(policy), probabilities(reference), strict=True))


@given(policy=LOGPROBS, reference=LOGPROBS)
def test_the_estimate_is_never_negative(policy: float, reference: float) -> None:
    assert float(k3(double([policy]), double([reference]))) >= -1e-15  # rounding of e^d - d - 1 near d = 0


@given(policy=LOGPROBS, reference=LOGPROBS)
def test_the_estimate_is_zero_only_at_equality(policy: float, reference: float) -> None:
    assert float(k3(double([policy]), double([policy]))) == 0
    assume(abs(policy - reference) > 1e-6)
    assert float(k3(double([policy]), double([reference]))) > 0


@given(policy=LOGITS, reference=LOGITS)
def test_its_mean_is_the_exact_divergence(policy: list[float], reference: list[float]) -> None:
    found = expected_k3(policy, reference)
    assert found == pytest.approx(exact_kl(policy, reference), rel=1e-6, abs=1e-9)
    assert found >= -1e-12


@given(policy=LOGITS, reference=LOGITS)
def test_its_mean_is_zero_only_where_the_distributions_are_equal(policy: list[float], reference: list[float]) -> None:
    assert expected_k3(policy, [logit + 1.5 for logit in policy]) == pytest.approx(0, abs=1e-12)
    ours, theirs = torch.softmax(double(policy), -1), torch.softmax(double(reference), -1)
    distance = float((ours - theirs).abs().sum())
    assert expected_k3(policy, reference) >= distance**2 / 2 - 1e-12  # Pinsker's inequality


def test_it_is_not_symmetric() -> None:
    """pi = (1/2, 1/2), ref = (9/10, 1/10): 0.5108 one way, 0.3681 the other."""
    fair, biased = [0.0, 0.0], [math.log(9), 0.0]
    assert expected_k3(fair, biased) == pytest.approx(0.5108, abs=1e-4)
    assert expected_k3(biased, fair) == pytest.approx(0.3681, abs=1e-4)


@given(policy=LOGPROBS, reference=LOGPROBS)
def test_its_gradient_pulls_towards_the_reference(policy: float, reference: float) -> None:
    """d/dlog pi = 1 - pi_ref / pi (DeepSeekMath eq. 21, with its sign turned)."""
    logprob = double([policy]).requires_grad_()
    k3(logprob, double([reference])).sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(1 - math.exp(reference - policy), rel=1e-9, abs=1e-12)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logits=st.lists(st.lists(st.floats(-6, 6, width=32), min_size=4, max_size=4), min_size=2, max_size=2))
def test_it_holds_for_log_probabilities_of_a_divided_vocabulary(two_ranks: TwoRanks, logits: list[list[float]]) -> None:
    """Every token's log-probability under policy and reference, from two processes with half the vocabulary each."""
    policy, reference = logits
    rows = [policy] * 4 + [reference] * 4
    cross_entropies, _ = two_ranks.cross_entropy(rows, [0, 1, 2, 3] * 2)
    ours, theirs = -double(cross_entropies[:4]), -double(cross_entropies[4:])
    assert float(k3(ours, theirs).min()) >= -1e-15
    assert float((ours.exp() * k3(ours, theirs)).sum()) == pytest.approx(
        exact_kl(policy, reference), rel=1e-4, abs=1e-5
    )
    assert float(k3(ours, ours).abs().max()) == 0
