"""What the wrapper does to a model before its first update; updates themselves are in tests/train/test_policy.py."""

import json
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.model.trainable import Trainable
from megatron_r1.optim.optimizer import make_trainable

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"


def trainable(tmp_path: Path, optim: OptimSection, dtype: str = "float32") -> Trainable:
    config = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    initialize(ParallelSection(), seed=0)
    section = ModelSection.model_validate({"path": tmp_path, "load_weights": False, "dtype": dtype})
    return make_trainable(build_model(section, 64), optim, updates=10)


def rates(made: Trainable, count: int) -> list[float]:
    """The learning rate of the first updates."""
    found = []
    for _ in range(count):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.scheduler.step(1)
    return found


def test_expert_gradients_are_marked_for_reduction(tmp_path: Path) -> None:
    made = trainable(tmp_path, OptimSection(lr=1e-3))
    marks = {name: getattr(param, "allreduce", True) for name, param in made.chunks[0].named_parameters()}
    experts = [name for name in marks if ".experts." in name]
    assert experts
    assert [name for name, reduced in marks.items() if reduced == (name in experts)] == []


def test_routing_counts_stay_exact_in_bfloat16(tmp_path: Path) -> None:
    made = trainable(tmp_path, OptimSection(lr=1e-3), dtype="bfloat16")
    buffers = {
        name: getattr(module, name).dtype
        for module in made.chunks[0].modules()
        for name in ("local_tokens_per_expert", "expert_bias")
        if isinstance(getattr(module, name, None), torch.Tensor)
    }
    assert buffers == {"local_tokens_per_expert": torch.float32, "expert_bias": torch.float32}
    assert {param.dtype for param in made.chunks[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1e-3] * 10),
        ("constant", 4, [2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 7]),
        ("linear", 0, [1e-3 - 9e-5 * k for k in range(1, 11)]),
        ("linear", 20, [1e-3 * k / 20 for k in range(1, 11)]),
    ],
)
def test_schedules(tmp_path: Path, schedule: str, warmup: int, expected: list[float]) -> None:
    """Update k = 1, 2, ... of 10 has the rate of step k: the first is not lost at 0, the last reaches min_lr."""
    optim = OptimSection.model_validate({"lr": 1e-3, "min_lr": 1e-4, "schedule": schedule, "warmup_steps": warmup})
    assert rates(trainable(tmp_path, optim), 10) == pytest.approx(expected, rel=1e-6)


def test_settings_reach_the_optimizer(tmp_path: Path) -> None:
    made = trainable(tmp_path, OptimSection(lr=1e-3, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.3))
    groups = made.optimizer.param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.99), 1e-6)}
    decays = [group["weight_decay"] for group in groups for _ in group["params"]]
    assert set(decays) <= {0.0, 0.3}
    assert max(decays) == 0.3
