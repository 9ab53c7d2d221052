"""Learning rates by phases, against Megatron's own schedules and against DeepSeek-V3's report."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1.config.schedule import Phase, Piece
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.optim.schedule import LearningRate, PhaseScheduler, apply

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"
V3 = [
    Phase(until_tokens=10e12),
    Phase(schedule="cosine", lr=2.2e-5, until_tokens=14.3e12),
    Phase(until_tokens=14.633e12),
    Phase(lr=7.3e-6),
]


class Optimizer:
    """The part of one that a scheduler touches."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "wd_mult": 0.0}]


def of_megatron(style: str, warmup: int, steps: int) -> list[float]:
    scheduler = OptimizerParamScheduler(Optimizer(), 0.0, 1e-3, 1e-4, warmup, steps, style, 0.1, 0.1, steps, "constant")
    return [scheduler.step(1) or scheduler.optimizer.param_groups[0]["lr"] for _ in range(steps + 5)]


def rates(phases: list[Phase], warmup: int, steps: int, tokens: Callable[[int], int] | None = None) -> list[float]:
    rate = LearningRate(1e-3, warmup, phases, tokens)
    return [rate.at(update) for update in range(steps)]


@pytest.mark.parametrize("style", ["linear", "cosine"])
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_one_phase_is_megatrons_schedule(style: Any, unit: str) -> None:
    if unit == "steps":
        found = rates([Phase(schedule=style, lr=1e-4, until_step=20)], 0, 25)
    else:
        found = rates([Phase(schedule=style, lr=1e-4, until_tokens=60)], 0, 25, lambda update: 3 * update)
    assert found == pytest.approx(of_megatron(style, 0, 20), rel=1e-12)
    assert found[19] == 1e-4


def test_warm_up_is_megatrons() -> None:
    assert rates([Phase(until_step=20)], 7, 25) == pytest.approx(of_megatron("constant", 7, 20), rel=1e-12)


def test_phases_follow_one_another() -> None:
    phases = [
        Phase(until_step=2),
        Phase(schedule="linear", lr=2e-4, until_step=6),
        Phase(until_step=7),
        Phase(schedule="cosine", lr=0.0, until_step=9),
    ]
    expected = [1e-3, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 2e-4, 1e-4, 0.0, 0.0, 0.0]
    assert rates(phases, 0, 11) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_a_phase_in_tokens_ends_with_the_update_that_reaches_them() -> None:
    """Batches of 10, 20, 30 ... tokens; the third begins at 30 and reaches 60."""
    phases = [Phase(schedule="linear", lr=0.0, until_tokens=50), Phase(lr=5e-4)]
    found = rates(phases, 0, 5, lambda update: 5 * update * (update + 1))
    assert found == pytest.approx([8e-4, 4e-4, 0.0, 5e-4, 5e-4], abs=1e-18)


def test_deepseek_v3() -> None:
    """2.2e-4 after 2 K steps, to 10 T tokens; cosine to 2.2e-5 over 4.3 T; 333 B at it; 167 B at 7.3e-6 (4.2)."""
    tokens = 15360 * 4096
    rate = LearningRate(2.2e-4, 2000, V3, lambda update: update * tokens)
    at = {
        position: rate.at(math.ceil(position * 1e12 / tokens)) for position in (0.5, 9.999, 12.15, 14.31, 14.64, 14.8)
    }
    assert [rate.at(0), rate.at(999), rate.at(1999)] == pytest.approx([2.2e-4 / 2000, 1.1e-4, 2.2e-4])
    assert at[0.5] == at[9.999] == 2.2e-4
    assert at[12.15] == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-4)
    assert at[14.31] == 2.2e-5
    assert at[14.64] == at[14.8] == 7.3e-6


def test_the_scheduler_goes_on_where_a_checkpoint_stood() -> None:
    def make() -> PhaseScheduler:
        return PhaseScheduler(
            Optimizer(), LearningRate(1e-3, 3, [Phase(schedule="cosine", lr=1e-5, until_step=9)], None), 0.1
        )

    def run(scheduler: PhaseScheduler, steps: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(steps):
            scheduler.step(1)
            found.append(tuple((group["lr"], group["weight_decay"]) for group in scheduler.optimizer.param_groups))
        return found

    whole, first, second = make(), make(), make()
    expected = run(whole, 10)
    assert [lr for (lr, _), _ in expected] == rates([Phase(schedule="cosine", lr=1e-5, until_step=9)], 3, 10)
    assert {(decay, none) for (_, decay), (_, none) in expected} == {(0.1, 0.0)}
    begun = run(first, 4)
    second.load_state_dict(first.state_dict())
    assert begun + run(second, 6) == expected


def test_phases_in_tokens_need_a_run_that_counts_them() -> None:
    with pytest.raises(ConfigError, match="only pretraining counts tokens"):
        LearningRate(1e-3, 0, V3, None)


Measure = Callable[[ModelSection, int], tuple[float, float]]


@pytest.fixture(scope="module")
def measure() -> Measure:
    """Norm of the embedding's gradient by the MTP loss alone, and the largest move of a routing bias, in one step."""
    initialize(ParallelSection(), seed=0)
    section = ModelSection(path=MODEL, load_weights=False, dtype="float32", init_std=0.08, balance_loss_coef=0.0)
    module = build_model(section, 64).module.train()
    tokens = torch.arange(48)[None] % 40
    biases = [buffer for name, buffer in module.named_buffers() if name.endswith("expert_bias")]

    def one_step(section: ModelSection, consumed: int) -> tuple[float, float]:
        apply(module.config, section, consumed)
        module.zero_grad()
        for bias in biases:
            bias.zero_()
        loss = module(tokens[:, :-1], torch.arange(47)[None], None, labels=tokens[:, 1:])
        (0 * loss.sum()).backward()
        _update_router_expert_bias([module], module.config)
        gradient = module.embedding.word_embeddings.weight.grad
        return float(gradient.norm()), max(float(bias.abs().max()) for bias in biases)

    return one_step


def test_coefficients_are_in_force_from_their_tokens_on(measure: Measure) -> None:
    """In what Megatron computes: the MTP loss's gradient is as many times smaller, the bias moves by gamma."""
    section = ModelSection.model_construct(
        mtp_loss_coef=[Piece(value=0.3, until_tokens=1000), Piece(value=0.1, until_tokens=2000), Piece(value=0.0)],
        bias_update_rate=[Piece(value=1e-3, until_tokens=1500), Piece(value=0.0)],
    )
    gradients, moves = zip(*[measure(section, consumed) for consumed in (0, 999, 1000, 1500, 2000)], strict=True)
    assert gradients[0] > 0
    assert [gradient / gradients[0] for gradient in gradients] == pytest.approx([1, 1, 1 / 3, 1 / 3, 0], rel=1e-5)
    assert moves == pytest.approx([1e-3, 1e-3, 1e-3, 0, 0], rel=1e-5)


def test_numbers_hold_for_the_whole_run(measure: Measure) -> None:
    section = ModelSection.model_construct(mtp_loss_coef=0.3, bias_update_rate=2e-3)
    assert measure(section, 0) == measure(section, 10**15)
