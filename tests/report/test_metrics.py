import contextlib
from types import SimpleNamespace

import pytest

from megatron_r1.report import metrics
from megatron_r1.report.metrics import PhaseClock


@pytest.fixture
def clock(monkeypatch):
    """Time that goes only when the test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.seconds)
    return now


def test_an_inner_phase_is_not_counted_twice(clock):
    phases = PhaseClock()
    with phases.phase("rollout"):
        clock.seconds += 2
        with phases.phase("reward"):
            clock.seconds += 3
        clock.seconds += 5
    clock.seconds += 100
    with phases.phase("reward"):
        clock.seconds += 1
    assert phases.take() == {"rollout": 7.0, "reward": 4.0}
    assert phases.take() == {}


def test_a_phase_ends_with_its_exception(clock):
    phases = PhaseClock()
    with contextlib.suppress(RuntimeError), phases.phase("rollout"):
        clock.seconds += 2
        raise RuntimeError
    assert phases.current == ""
    assert phases.take() == {"rollout": 2.0}
