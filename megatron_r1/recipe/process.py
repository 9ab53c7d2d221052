"""One verb as a child process: started, watched, ended with the recipe."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_r1.errors import UserError

POLL_SECONDS = 1.0
END_SECONDS = 60.0
"""Between asking a verb to end and forcing it: one that waits inside a collective never hears."""
DISK_FULL = 74
"""Exit code of a command that could not write because the disk is full (EX_IOERR of sysexits.h)."""


class StageError(UserError, RuntimeError):
    """A stage, or a service that it needs, did not do its work."""


def environment() -> dict[str, str]:
    """That of stages and services: one OpenMP thread a process, unless told otherwise.

    Two on busy cores cost many times what they gain.
    """
    return {"OMP_NUM_THREADS": "1"} | os.environ


def run_verb(verb: str, config: Path, lock: int, quiet: bool, watch: Callable[[], None]) -> int:
    """Run `megatron-r1 <verb> <config>` with its console passed through, and wait for it.

    Args:
        verb: as on the command line.
        config: its run file.
        lock: a file descriptor that stays open until nothing of the verb is left.
        quiet: its standard output goes to standard error.
        watch: called about once a second; what it raises ends the verb.

    Returns:
        The verb's exit code, 128 + the signal if one killed it.
    """
    command = [sys.executable, "-m", "megatron_r1.cli", *verb.split(), str(config)]
    keeper = subprocess.Popen(
        [sys.executable, "-m", "megatron_r1.recipe.keeper", str(os.getpid()), *command],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if quiet else None,
        start_new_session=True,
        pass_fds=[lock],
    )
    try:
        while True:
            try:
                return keeper.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                watch()
    except BaseException:  # Ctrl-C and SIGTERM too
        keeper.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(END_SECONDS)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()
