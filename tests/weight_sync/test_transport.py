"""Which transport a run has, and what it says of a push before the first one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError
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


def test_preflight_sends_one_tensor_and_loses_none() -> None:
    whole = {"a": torch.zeros(4, 2**18), "b": torch.zeros(3, 2**20)}

    def collected() -> Iterator[tuple[str, torch.Tensor]]:
        yield from whole.items()

    sync, tensors = Noting(), NamedTensors(collected(), NamedTensors.of(whole).specs)
    plan = preflight(sync, tensors)
    sync.push(tensors, 0)
    assert sync.pushed == [(PREFLIGHT, ["a"]), (PREFLIGHT, ["a"]), (0, ["a", "b"])]
    assert plan == PushPlan(2, 2**24, "disk", "a", 2**22, 0.5)
    assert plan.seconds == 2.0
    said = "weights reach the engines by disk: 2 tensors, 16.0 MiB a push, at most about 2 s (a, 4.00 MiB, took 0.5 s)"
    assert str(plan) == said
