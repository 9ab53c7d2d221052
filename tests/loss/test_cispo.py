"""CISPO against numbers worked by hand and a loop written from the paper."""

import math

import pytest
import torch

from megatron_r1.loss.cispo import Cispo
from tests.loss.rollout_inputs import Response, responses, tensors


def test_worked_by_hand() -> None:
    """Ratios 4 and 1/4 with weights 2 (clipped) and 1/4; advantages 1 and -2: the gradient is -w A / 2 at each."""
    loss = Cispo(Cispo.Config(clip_eps_high=1.0))
    new, inputs = tensors(
        loss, [Response([math.log(0.8), math.log(0.1)], [math.log(0.2), math.log(0.4)], [0, 0], [1, -2])]
    )
    value, metrics = loss(new, inputs)
    assert value.item() == pytest.approx(-(2 * math.log(0.8) - 0.5 * math.log(0.1)) / 2)
    assert metrics["clip_fraction"].item() == 0.5
    value.backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.0, 0.25])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("low", "bound"), [(None, 0.0), (0.1, 0.9)])
def test_value_and_gradient_equal_a_loop(seed: int, low: float | None, bound: float) -> None:
    made, loss = responses(seed), Cispo(Cispo.Config(clip_eps=low, clip_eps_high=0.5))
    new, inputs = tensors(loss, made)
    value, _ = loss(new, inputs)
    value.backward()
    total, gradient, tokens = 0.0, [], sum(len(one.new) for one in made)
    for one in made:
        for now, old, advantage in zip(one.new, one.old, one.advantages, strict=True):
            weight = min(max(math.exp(now - old), bound), 1.5)
            total += weight * advantage * now
            gradient.append(-weight * advantage / tokens)
    assert value.item() == pytest.approx(-total / tokens, rel=1e-9)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx(gradient, rel=1e-9)


def test_a_clipped_token_keeps_its_gradient() -> None:
    """What PPO's clip would silence: ratio e^2 and a positive advantage."""
    loss = Cispo(Cispo.Config(clip_eps_high=0.2))
    new, inputs = tensors(loss, [Response([-1.0], [-3.0], [0.0], [1.0])])
    loss(new, inputs)[0].backward()
    assert torch.equal(new.grad, torch.tensor([-1.2], dtype=torch.float64))  # type: ignore[arg-type]
