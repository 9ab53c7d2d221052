"""Signals that ask a training run to save and to end.

SIGTERM is what schedulers send before they kill; SIGUSR1 is what Slurm sends ahead of time (`--signal=B:USR1@120`). A
handler only notes them: the loop ends when a step is whole and saved. A process that has been asked so hears no further
signal when it has left the loop: schedulers send several, and none may break off what is put away, or change the exit
code.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVED = 75
"""Exit code of a run that has saved because it was asked to end (EX_TEMPFAIL of sysexits.h): the same command goes on.
Slurm puts such a job back into its queue by `RequeueExit=75` in slurm.conf, or by
`[ $? = 75 ] && scontrol requeue $SLURM_JOB_ID` in the job's script."""


class Stopped(SystemExit):
    """The run was asked to end, and all that it has done is saved."""

    def __init__(self) -> None:
        super().__init__(SAVED)


class Requests:
    """Whether this process has been asked to end.

    Args:
        grace: seconds after SIGTERM in which the step has to end; later the process ends without saving.
    """

    def __init__(self, grace: float) -> None:
        self.asked = False
        self._grace, self._expired, self._reached = grace, threading.Event(), False
        self._timer = self._new_timer()

    def reached(self) -> None:
        """The step has ended in time: saving, and all that comes after it, may take as long as it needs."""
        self._reached = True
        self._timer.cancel()
        self._expired.clear()

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._expired.is_set():
            self.reached()  # this ends it, and no further signal
            sys.exit(128 + signal.SIGTERM)
        if signum == signal.SIGTERM and not self._timer.ident and not self._reached:
            self._timer.start()
        self.asked = True

    def _new_timer(self) -> threading.Timer:
        timer = threading.Timer(self._grace, self._expire)
        timer.daemon = True
        return timer

    def _expire(self) -> None:
        self._expired.set()
        os.kill(os.getpid(), signal.SIGTERM)  # an exception can be raised in the main thread by a signal alone

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note signals during the block; if a rank has heard one, they are ignored afterwards."""
        self._timer, self._reached = self._new_timer(), False
        before = {signum: signal.signal(signum, self.note) for signum in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            ending = self.asked or self._reached
            self.reached()
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_IGN if ending else handler)
