"""What the collector notes of the fleet and of the weights' way into it."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.parallel import initialize
from megatron_r1.report.spans import SPANS, SYNC
from megatron_r1.train.collector import Collector
from megatron_r1.weight_sync.named_tensors import NamedTensors


@pytest.fixture
def collector() -> Collector:
    initialize(ParallelSection(), seed=1)
    made = Collector(*cast(Any, [None] * 4))
    figures = {"engines_ready": 2.0, "engine-0/queue": 3.0, "engine-11/weights": 4.0}
    made._tried = True
    made._fleet = cast(Any, SimpleNamespace(updated=0.0, figures=lambda: figures, idle=lambda: 0.25))
    return made


class Sync:
    """Hands over weights as a file, or one by one."""

    def __init__(self, fleet: Any, streams: bool) -> None:
        self._fleet, self._streams = fleet, streams

    def push(self, tensors: NamedTensors, version: int) -> None:
        if self._streams:
            self._fleet.updated = time.monotonic()
        assert [name for name, _ in tensors] == ["a", "b"]
        if not self._streams:
            self._fleet.updated = time.monotonic()


@pytest.mark.parametrize(("streams", "parts"), [(False, ["gather", "write"]), (True, ["gather"])])
def test_gathering_and_writing_are_told_apart(collector: Collector, streams: bool, parts: list[str]) -> None:
    collector._sync = cast(Any, Sync(collector._fleet, streams))
    SPANS.take()
    collector._push(NamedTensors.of({"a": torch.ones(1), "b": torch.ones(1)}), 3)
    spans = SPANS.take()
    assert [(one.lane, one.name) for one in spans] == [(SYNC, part) for part in parts]
    assert all(one.seconds >= 0 for one in spans)


def test_figures_are_named_by_what_they_are_then_by_engine(collector: Collector) -> None:
    assert collector.fleet_figures() == {
        "fleet_idle": 0.25,
        "fleet_engines_ready": 2.0,
        "fleet_queue/engine-0": 3.0,
        "fleet_weights/engine-11": 4.0,
    }
