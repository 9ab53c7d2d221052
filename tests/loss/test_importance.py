"""Importance weights against values worked by hand, and what they do to a policy-gradient loss."""

import math

import pytest
import torch

from megatron_r1.config.asynchrony import CorrectionSection
from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.grpo import Grpo
from megatron_r1.loss.importance import importance_weights

SEGMENTS = torch.tensor([0, 0, 0, 1, 1])
LOG_RATIO = torch.tensor([math.log(3), math.log(0.5), 0.0, math.log(1.5), math.log(0.25)])
"""Ratios 3, 1/2, 1 of the first response (their product 3/2), 3/2, 1/4 of the second (3/8)."""


def weights(**changes: object) -> tuple[list[float], list[bool]]:
    section = CorrectionSection.model_validate({"kind": "token"} | changes)
    found, changed = importance_weights(LOG_RATIO, SEGMENTS, section)
    return found.tolist(), changed.tolist()


def test_none_weighs_all_tokens_alike() -> None:
    assert weights(kind="none") == ([1.0] * 5, [False] * 5)


def test_ratios_of_tokens_are_capped() -> None:
    found, changed = weights(cap=2.0)
    assert found == pytest.approx([2, 0.5, 1, 1.5, 0.25])
    assert changed == [True, False, False, False, False]


def test_tokens_out_of_bounds_are_dropped() -> None:
    found, changed = weights(outside="drop", floor=0.4, cap=2.0)
    assert found == pytest.approx([0, 0.5, 1, 1.5, 0])
    assert changed == [True, False, False, False, True]


def test_all_tokens_of_a_response_have_the_ratio_of_the_whole() -> None:
    found, changed = weights(kind="sequence", cap=1.2)
    assert found == pytest.approx([1.2] * 3 + [0.375] * 2)
    assert changed == [True] * 3 + [False] * 2


def test_responses_out_of_bounds_are_dropped() -> None:
    found, changed = weights(kind="sequence", outside="drop", floor=0.5, cap=2.0)
    assert found == pytest.approx([1.5] * 3 + [0] * 2)
    assert changed == [False] * 3 + [True] * 2


def test_a_product_that_overflows_is_capped() -> None:
    section = CorrectionSection(kind="sequence")
    found, changed = importance_weights(torch.full((2000,), 1.0), torch.zeros(2000, dtype=torch.long), section)
    assert found.tolist() == [2.0] * 2000
    assert changed.all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"floor": 0.5}, "floor goes with outside"), ({"outside": "drop", "floor": 3.0}, "floor 3 is not below cap 2")],
)
def test_bounds_that_bound_nothing_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(**keys)


def test_the_gain_is_weighted_and_the_penalty_is_not() -> None:
    """Three tokens of weight 1/3, on-policy: the gradient of the gain is -A w / 3, of k3 (1 - pi_ref / pi) / 3."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    inputs = LossInputs(
        weights=torch.full((3,), 1 / 3),
        segments=torch.zeros(3, dtype=torch.long),
        advantages=torch.tensor([1.0, 1.0, -2.0]),
        old_logprobs=logprobs.detach().clone(),
        ref_logprobs=logprobs.detach() - math.log(2),
        importance=torch.tensor([2.0, 0.0, 0.5]),
    )
    loss, metrics = Grpo(Grpo.Config(kl_coef=0.3))(logprobs, inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    penalty = 0.3 * (1 - 0.5) / 3
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-2 / 3 + penalty, penalty, 1 / 3 + penalty])
    assert float(metrics["loss"]) == pytest.approx(-(2 - 0.5 * 2) / 3 + 0.3 * (0.5 - math.log(0.5) - 1))
