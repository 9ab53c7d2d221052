"""Signals where a run waits, and where it does not."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_r1.train.interruption import InterruptionError, Interruptions

BOTH = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def noted() -> Iterator[list[int]]:
    """What somebody who has listened before hears."""
    heard: list[int] = []
    before = {signum: signal.signal(signum, lambda signum, frame: heard.append(signum)) for signum in BOTH}
    yield heard
    for signum, handler in before.items():
        signal.signal(signum, handler)


def wait(interruptions: Interruptions, sent: signal.Signals, close: Callable[[], None] = lambda: None) -> None:
    """Wait for a minute, in which a signal comes; `close` what was waited for."""
    with interruptions.at_once():
        try:
            os.kill(os.getpid(), sent)
            time.sleep(60)
        finally:
            close()


@pytest.mark.parametrize("sent", BOTH)
def test_a_wait_is_ended_at_once(noted: list[int], sent: signal.Signals) -> None:
    interruptions = Interruptions()
    with interruptions.heard():
        with pytest.raises(InterruptionError):
            wait(interruptions, sent)
        assert noted == [sent]


def test_what_has_come_before_ends_the_next_wait(noted: list[int]) -> None:
    interruptions = Interruptions()
    with interruptions.heard():
        with interruptions.at_once():
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(InterruptionError), interruptions.at_once():
            pytest.fail("it waits")
    assert noted == [signal.SIGUSR1]


def test_a_second_signal_breaks_nothing_off(noted: list[int]) -> None:
    interruptions, closed = Interruptions(), []

    def close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        closed.append(True)

    with interruptions.heard(), pytest.raises(InterruptionError):
        wait(interruptions, signal.SIGUSR1, close)
    assert closed
    assert noted == [signal.SIGUSR1], "nor does a clock begin to run for it"


def test_afterwards_those_listen_who_did_before(noted: list[int]) -> None:
    handlers = [signal.getsignal(signum) for signum in BOTH]
    with Interruptions().heard():
        assert [signal.getsignal(signum) for signum in BOTH] != handlers
    assert [signal.getsignal(signum) for signum in BOTH] == handlers
