"""How busy engines are, by a clock that the test winds."""

import time

import pytest

from megatron_r1.rollout.meters import Busy, Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_an_engines_figures_are_of_the_time_in_which_it_was_busy(clock: list[float]) -> None:
    """2 s with 4 samples, 2 s with 2, 6 s with none; 30 tokens each."""
    meter = Meter()
    meter.asked(4)
    clock[0] += 2
    for _ in range(2):
        meter.answered(30)
    meter.asked(-2)
    clock[0] += 2
    for _ in range(2):
        meter.answered(30)
    meter.asked(-2)
    clock[0] += 6
    assert meter.figures() == {"tokens_per_s": 120 / 4, "queue": 3.0, "outstanding_tokens": 3.0 * 30}
    assert meter.figures() == {"tokens_per_s": 0.0, "queue": 0.0, "outstanding_tokens": 0.0}
    meter.asked(5)
    clock[0] += 1
    assert meter.figures() == {"tokens_per_s": 0.0, "queue": 5.0, "outstanding_tokens": 150.0}, (
        "as long as the last ones"
    )


def test_the_share_of_busy_engines_over_time(clock: list[float]) -> None:
    busy = Busy()
    busy.change(2)
    clock[0] += 3
    busy.change(-1)
    clock[0] += 1
    assert busy.mean() == (2 * 3 + 1 * 1) / 4
    clock[0] += 2
    assert busy.mean() == 1.0
