"""What the wrapper does to a model before its first update; updates themselves are in tests/train/test_policy.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.model.trainable import Trainable
from megatron_r1.optim import optimizer
from megatron_r1.optim.optimizer import make_trainable

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"


def trainable(tmp_path: Path, optim: OptimSection, dtype: str = "float32", **keys: Any) -> Trainable:
    config = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    initialize(ParallelSection(), seed=0)
    section = ModelSection.model_validate({"path": tmp_path, "load_weights": False, "dtype": dtype} | keys)
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


KEPT = {"use_precision_aware_optimizer": True}
REACHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lr": 2e-3}, {"lr": 2e-3}),
    ({"min_lr": 1e-5}, {"min_lr": 1e-5}),
    ({"beta1": 0.8}, {"adam_beta1": 0.8}),
    ({"beta2": 0.99}, {"adam_beta2": 0.99}),
    ({"eps": 1e-6}, {"adam_eps": 1e-6}),
    ({"weight_decay": 0.3}, {"weight_decay": 0.3}),
    ({"clip_grad": 0.5}, {"clip_grad": 0.5}),
    ({"moments": "bfloat16"}, KEPT | {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}),
    ({"gradients": "bfloat16"}, KEPT | {"main_grads_dtype": torch.bfloat16, "grad_reduce_in_fp32": False}),
    ({"master": "float16"}, KEPT | {"main_params_dtype": torch.float16}),
    (
        {"offload": 0.25},
        KEPT
        | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25, "overlap_cpu_optimizer_d2h_h2d": True},
    ),
]
"""[optim] of a run file -> what it changes in Megatron's configs of optimizer and wrapper."""
OF_THE_SCHEDULE = {"schedule", "warmup_steps", "phases"}
UNCHANGED = {"main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"}


class _ReachedError(Exception):
    """Megatron has been called with its config."""


def megatrons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optim: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Both configs that Megatron is given; lower precision, which takes a GPU to build, is not refused."""
    found: dict[str, Any] = {}

    def reached(config: dict[str, Any], ddp: list[Any], **_: Any) -> None:
        assert config.keys() <= {field.name for field in dataclasses.fields(OptimizerConfig)}
        found.update(dataclasses.asdict(ddp[0].ddp_config) | config)
        raise _ReachedError

    monkeypatch.setattr(optimizer, "refuse", lambda rules, setting: None)
    monkeypatch.setattr(optimizer, "let_megatron_make_its_state", lambda kind: None)
    monkeypatch.setattr(optimizer, "OptimizerConfig", dict)  # Megatron's own asks for Transformer Engine
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", reached)
    with pytest.raises(_ReachedError):
        trainable(tmp_path, OptimSection.model_validate({"lr": 1e-3} | optim), **keys)
    return found


@pytest.mark.parametrize(("written", "changed"), REACHES, ids=[str(written) for written, _ in REACHES])
def test_a_key_changes_its_own_field(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: dict[str, Any], changed: dict[str, Any]
) -> None:
    plain = dict.fromkeys(UNCHANGED, torch.float32) | {
        "use_precision_aware_optimizer": False,
        "optimizer_cpu_offload": False,
        "optimizer_offload_fraction": 0.0,
        "overlap_cpu_optimizer_d2h_h2d": False,
    }
    before = plain | megatrons(monkeypatch, tmp_path, {})
    found = before | megatrons(monkeypatch, tmp_path, written)
    assert {name: value for name, value in found.items() if before[name] != value} == changed


def test_no_key_is_left_out() -> None:
    assert {name for written, _ in REACHES for name in written} == OptimSection.model_fields.keys() - OF_THE_SCHEDULE


@pytest.mark.parametrize("overlap", [True, False])
def test_the_overlap_of_reduction_reaches_the_wrapper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overlap: bool
) -> None:
    found = megatrons(monkeypatch, tmp_path, {}, kernels={"overlap_gradient_reduction": overlap})
    assert found["overlap_grad_reduce"] is overlap
