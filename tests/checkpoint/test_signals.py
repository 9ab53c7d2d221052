"""Signals are noted, and end a process only when its step takes too long."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_r1.checkpoint.signals import SAVED, Requests, Stopped
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.cli import _terminate
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.train.policy import Policy


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", CheckpointSection(every=10), {"seed": 0})


BOTH = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def sending(*sent: signal.Signals) -> Iterator[None]:
    """Something that a run puts away at its end, while signals come."""
    try:
        yield
    finally:
        for one in sent:
            os.kill(os.getpid(), one)


@pytest.mark.parametrize("again", BOTH)
@pytest.mark.parametrize("sent", BOTH)
def test_a_signal_saves_and_ends_after_the_step(
    checkpoints: Checkpoints, small: Policy, sent: signal.Signals, again: signal.Signals
) -> None:
    """As the command has it: what comes later, to the end of the process, neither ends it sooner nor otherwise."""
    for signum in BOTH:
        signal.signal(signum, _terminate)

    def train() -> None:
        with sending(again, again), checkpoints.running(print), sending(again, again):
            assert not checkpoints.due(1, 20)
            os.kill(os.getpid(), sent)
            assert checkpoints.due(2, 20)
            checkpoints.save(2, small.trainable, {}, {})

    with pytest.raises(Stopped) as ended:
        train()
    os.kill(os.getpid(), again)
    assert ended.value.code == SAVED == 75
    assert checkpoints.latest() == 2


def test_what_was_never_asked_is_as_before(checkpoints: Checkpoints) -> None:
    handlers = [signal.getsignal(one) for one in BOTH]
    with checkpoints.running(print):
        assert [signal.getsignal(one) for one in BOTH] != handlers
    assert [signal.getsignal(one) for one in BOTH] == handlers


def test_no_clock_runs_for_a_signal_after_the_step() -> None:
    requests = Requests(grace=0.05)
    with requests.heard():
        os.kill(os.getpid(), signal.SIGUSR1)
        requests.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)


def test_the_last_step_ends_the_run_as_ever(checkpoints: Checkpoints, small: Policy) -> None:
    with checkpoints.running(print):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert checkpoints.due(3, 3)
        checkpoints.save(3, small.trainable, {}, {})
    assert checkpoints.latest() == 3


def test_a_step_that_does_not_end_in_time_is_ended() -> None:
    with Requests(grace=0.05).heard():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            time.sleep(60)
    assert ended.value.code == 128 + signal.SIGTERM


def test_it_is_ended_once() -> None:
    def train() -> None:
        with Requests(grace=0.05).heard(), sending(*BOTH, *BOTH):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("sent", [(signal.SIGUSR1,), (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)])
def test_nothing_ends_while_saving(sent: tuple[signal.Signals, ...]) -> None:
    """Nor does SIGUSR1 at any time: it leaves as long as whoever sends it has arranged."""
    requests = Requests(grace=0.05)
    with requests.heard():
        for one in sent:
            os.kill(os.getpid(), one)
        if signal.SIGTERM in sent:
            requests.reached()
        time.sleep(0.2)
    assert requests.asked
