"""Signals are noted, and end a process only when its step takes too long."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_r1.checkpoint.signals import SAVED, Requests, Stopped
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.train.policy import Policy


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", CheckpointSection(every=10), {"seed": 0})


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_after_the_step(checkpoints: Checkpoints, small: Policy, sent: signal.Signals) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)]
    with checkpoints.running(print):
        assert not checkpoints.due(1, 20)
        os.kill(os.getpid(), sent)
        assert checkpoints.due(2, 20)
        with pytest.raises(Stopped) as ended:
            checkpoints.save(2, small.trainable, {}, {})
    assert ended.value.code == SAVED == 75
    assert checkpoints.latest() == 2
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)] == handlers


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
