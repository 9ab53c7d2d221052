"""The critic's loss against numbers worked by hand and a loop."""

import pytest
import torch

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.value import Value


def inputs(old: list[float], returns: list[float]) -> LossInputs:
    n = len(old)
    weights = torch.tensor(Value(Value.Config()).token_weights([n])).expand(n)
    return LossInputs(weights, torch.zeros(n).long(), old_values=torch.tensor(old), returns=torch.tensor(returns))


def test_worked_by_hand() -> None:
    """eps 0.2, old value 0, return 1.

    0.1: near enough, (0.9)^2. 0.5: bounded at 0.2, (0.8)^2, no gradient. -0.5: away from the return, (1.5)^2 counts.
    """
    values = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    loss, metrics = Value(Value.Config(value_clip=0.2))(values, inputs([0.0] * 3, [1.0] * 3))
    assert loss.item() == pytest.approx((0.81 + 0.64 + 2.25) / 6)
    assert metrics["value_loss"].item() == loss.item()
    assert metrics["value_clip_fraction"].item() == pytest.approx(1 / 3)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.9 / 3, 0.0, -1.5 / 3])


def test_without_a_clip_it_is_half_the_squared_error() -> None:
    values = torch.tensor([0.3, -2.0])
    loss, metrics = Value(Value.Config(value_clip=0.0))(values, inputs([0.0, 0.0], [1.0, 1.0]))
    assert loss.item() == pytest.approx((0.49 + 9.0) / 4)
    assert metrics["value_clip_fraction"].item() == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_loop(seed: int) -> None:
    old, now, returns = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed)).tolist()
    loss, _ = Value(Value.Config(value_clip=0.5))(torch.tensor(now), inputs(old, returns))
    expected = 0.0
    for v, v_old, r in zip(now, old, returns, strict=True):
        near = min(max(v, v_old - 0.5), v_old + 0.5)
        expected += max((v - r) ** 2, (near - r) ** 2)
    assert loss.item() == pytest.approx(expected / 22, rel=1e-5)


def test_at_the_start_the_gradient_is_the_error() -> None:
    """V = V_old: not clipped, dL/dV = (V - R) / N."""
    old = [0.4, -0.3, 0.0]
    values = torch.tensor(old, requires_grad=True)
    Value(Value.Config())(values, inputs(old, [1.0, 1.0, 1.0]))[0].backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.2, -1.3 / 3, -1 / 3])
