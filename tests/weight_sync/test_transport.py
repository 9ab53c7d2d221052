"""Which transport a run has, and what it says of a push before the first one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_r1.config.sections import ParallelSection, RolloutSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.parallel import initialize
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.transport import PushPlan, TakesWeights, open_sync, preflight

HERE, THERE = "http://127.0.0.1:8700", "http://node7:8700"


def section(**settings: Any) -> RolloutSection:
    return RolloutSection(max_model_len=8, max_tokens=4, **settings)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, "shared_memory"),
        ({"first_gpu": 4, "arguments": ["--tensor-parallel-size=4"]}, "shared_memory"),
        ({"addresses": [HERE]}, "shared_memory"),
        ({"addresses": [HERE, THERE]}, "disk"),
        ({"addresses": [HERE], "transport": "disk"}, "disk"),
        ({"addresses": [THERE], "transport": "nccl"}, "nccl"),
        ({"addresses": [THERE], "transport": "nccl", "arguments": ["--data-parallel-size=2"]}, "nccl"),
        ({"transport": "ipc"}, "ipc"),
    ],
)
def test_auto(settings: dict[str, Any], chosen: str) -> None:
    assert section(**settings).chosen_transport == chosen


@pytest.mark.parametrize("settings", [{"addresses": [HERE]}, {"first_gpu": 1}, {"arguments": ["-tp=2"]}])
def test_ipc_stays_within_a_gpu(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="that the trainer's first rank has"):
        section(transport="ipc", **settings)


def test_nccl_needs_gpus_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.first_gpu or rollout\.addresses"):
        open_sync(section(transport="nccl"), cast(TakesWeights, None), tmp_path)


class Noting:
    """Takes a second for each push, and notes what it was given."""

    transport = "disk"

    def __init__(self) -> None:
        self.pushed: list[tuple[int, list[str]]] = []

    def push(self, tensors: NamedTensors, version: int) -> float:
        self.pushed.append((version, [name for name, _ in tensors]))
        return 100.0 if len(self.pushed) == 1 else 0.5

    def close(self) -> None: ...


class Exported:
    """Three tensors, of which two are tried, collected anew each time."""

    whole = {"a": torch.zeros(4, 2**18), "b": torch.zeros(3, 2**20), "c": torch.zeros(2**20)}

    def __init__(self, names: str = "abc") -> None:
        self.names, self.passes = names, 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        for name in self.names:
            yield name, self.whole[name]

    def specs(self) -> dict[str, Spec]:
        return {name: Spec(self.whole[name].dtype, tuple(self.whole[name].shape)) for name in self.names}

    def spread_out(self) -> "Exported":
        return self

    def of_each_stage(self) -> "Exported":
        self.few = Exported("ac")
        return self.few


def test_preflight_sends_what_each_stage_gives() -> None:
    """Twice, and collected twice; all of it says how long a push will take."""
    initialize(ParallelSection(), seed=0)
    sync, export = Noting(), Exported()
    plan = preflight(lambda tensors: sync.push(tensors, PREFLIGHT), export, "disk")
    assert sync.pushed == [(PREFLIGHT, ["a", "c"])] * 2
    assert (export.passes, export.few.passes) == (0, 2)
    assert plan == PushPlan(3, 5 * 2**22, "disk", ("a", "c"), 2**23, 0.5)
    assert plan.seconds == 0.5 * 20 / 8
    assert str(plan) == (
        "weights reach the engines by disk: 3 tensors, 20.0 MiB a push, at most about 1.2 s (2 of them, from every "
        "pipeline stage, 8.00 MiB, took 0.5 s)"
    )
