"""Signals that end a wait for the engines at once, and not at the end of the step.

A rollout may take hours, and nothing is lost with it but its samples: weights, optimizer and the questions drawn are
those of the last whole step. So SIGTERM and SIGUSR1 raise `InterruptionError` on the first rank, which alone waits for
the engines, and `from_first_rank` raises it on all. At any other time they are only noted.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptionError(Exception):
    """A signal has asked the run to end while it waited for its engines."""


class Interruptions:
    """Raises where a run waits; what else a signal does is left to who listened before (`Checkpoints.running`)."""

    def __init__(self) -> None:
        self._asked = self._waiting = self._raised = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen during the block."""
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}

        def note(signum: int, frame: FrameType | None) -> None:
            self._asked = True
            if self._raised:
                return  # a second signal must not break off what is done about the first, nor have a clock run for it
            if callable(handler := before[signal.Signals(signum)]):
                handler(signum, frame)
            if self._waiting:
                self._raised = True
                raise InterruptionError

        for signum in before:
            signal.signal(signum, note)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The first rank waits in the block.

        Raises:
            InterruptionError: a signal comes, or has come since the run began to listen.
        """
        self._waiting = True
        try:
            if self._asked:
                self._raised = True
                raise InterruptionError
            yield
        finally:
            self._waiting = False
