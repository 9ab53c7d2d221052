"""GSPO against numbers worked by hand and a loop written from the paper."""

import math

import pytest
import torch

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.gspo import Gspo
from tests.loss.rollout_inputs import Response, responses, tensors, with_one_advantage


def test_worked_by_hand() -> None:
    """Token ratios 4 and 1: s = sqrt(4) = 2, clipped at 1.5; with A = 1 and a second response of ratio 1 and A = -1."""
    loss = Gspo(Gspo.Config(clip_eps=0.5, clip_eps_high=0.5))
    made = [
        Response([math.log(0.8), -1.0], [math.log(0.2), -1.0], [0, 0], [1.0, 1.0]),
        Response([-1.0], [-1.0], [0], [-1.0]),
    ]
    value, metrics = loss(*tensors(loss, made))
    assert value.item() == pytest.approx(-(1.5 - 1.0) / 2)
    assert metrics["clip_fraction"].item() == 0.5
    assert metrics["ratio"].item() == pytest.approx(1.5)


@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_equal_a_loop(seed: int) -> None:
    made, loss = with_one_advantage(responses(seed, 0.3)), Gspo(Gspo.Config(clip_eps=0.02, clip_eps_high=0.03))
    new, inputs = tensors(loss, made)
    value, metrics = loss(new, inputs)
    assert metrics["clip_fraction"].item() > 0
    value.backward()
    twin = new.detach().clone().requires_grad_()
    terms, at = [], 0
    for one in made:
        n = len(one.old)
        ratio = torch.exp(sum(twin[at + t] - one.old[t] for t in range(n)) / n)  # type: ignore[arg-type]
        advantage = one.advantages[0]
        terms.append(torch.minimum(ratio * advantage, ratio.clamp(0.98, 1.03) * advantage))
        at += n
    expected = -torch.stack(terms).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(new.grad, twin.grad)


def test_an_idle_microbatch_adds_nothing() -> None:
    empty = torch.zeros(0)
    inputs = LossInputs(empty, torch.zeros(0, dtype=torch.long), empty, empty)
    assert Gspo(Gspo.Config())(empty.clone().requires_grad_(), inputs)[0].item() == 0.0
