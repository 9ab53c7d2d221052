"""One run at a time in an output folder: a run that was killed may still be ending its stage.

The lock is held by open file descriptors. The run hands its own to the processes that guard a stage or a service, so
the folder is free only when the last of them is gone.
"""

import fcntl
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_r1.errors import ConfigError

LOCK = ".lock"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 90.0
"""For the processes of a run that is itself gone."""


class Lock:
    """A context manager that holds the output folder.

    Raises:
        ConfigError: another run is at work there.
    """

    def __init__(self, output: Path) -> None:
        self._file = output / LOCK

    def __enter__(self) -> Self:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self.descriptor)
            raise
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, str(os.getpid()).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def _take(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        waited = False
        while not _try(self.descriptor, fcntl.LOCK_EX):
            owner = os.pread(self.descriptor, 32, 0).decode()
            if (owner and Path(f"/proc/{owner}").exists()) or time.monotonic() > deadline:
                raise ConfigError(
                    f"another run of a recipe (process {owner}) is at work in {self._file.parent}; wait for it or stop "
                    "it, or give this one another `output`"
                )
            if not waited:
                print("waiting for what an earlier run has left to end", file=sys.stderr, flush=True)
            waited = True
            time.sleep(POLL_SECONDS)


def is_held(output: Path) -> bool:
    """Is a run, or what it has left, at work in an output folder?"""
    try:
        descriptor = os.open(output / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
