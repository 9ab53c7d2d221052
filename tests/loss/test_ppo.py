"""PPO's policy loss against numbers worked by hand and a loop written from the paper."""

import math

import pytest
import torch

from megatron_r1.loss.ppo import Ppo
from tests.loss.rollout_inputs import Response, responses, tensors


def test_worked_by_hand() -> None:
    """Ratios 1.5 and 0.5, advantages 2 and -1, eps 0.2: min(3, 2.4) = 2.4 and min(-0.5, -0.8) = -0.8; mean 0.8."""
    loss = Ppo(Ppo.Config())
    new, inputs = tensors(loss, [Response([math.log(0.6), math.log(0.2)], [math.log(0.4)] * 2, [0, 0], [2.0, -1.0])])
    value, metrics = loss(new, inputs)
    assert value.item() == pytest.approx(-0.8)
    assert metrics["clip_fraction"].item() == 1.0
    assert metrics["ratio"].item() == pytest.approx(1.0)
    value.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_equal_a_loop(seed: int) -> None:
    made, loss = responses(seed), Ppo(Ppo.Config(clip_eps=0.3))
    new, inputs = tensors(loss, made)
    value, _ = loss(new, inputs)
    value.backward()
    twin = new.detach().clone().requires_grad_()
    at, terms = 0, []
    for one in made:
        for old, advantage in zip(one.old, one.advantages, strict=True):
            ratio = torch.exp(twin[at] - old)
            terms.append(torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage))
            at += 1
    expected = -torch.stack(terms).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(new.grad, twin.grad)


def test_kl_beside_the_gain_needs_a_reference() -> None:
    assert not Ppo(Ppo.Config()).needs_reference
    loss = Ppo(Ppo.Config(kl_coef=0.1))
    assert loss.needs_reference
    plain, _ = Ppo(Ppo.Config())(*tensors(loss, responses(0)))
    value, metrics = loss(*tensors(loss, responses(0)))
    assert value.item() == pytest.approx(plain.item() + 0.1 * metrics["kl"].item())
