"""One verb as a child process: started, watched, ended with the recipe."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_r1.errors import UserError

POLL_SECONDS = 1.0
END_SECONDS = 60.0
"""Between asking a verb to end and forcing it: one that waits inside a collective never hears."""
SAVED = 75
"""Exit code of a verb that has saved because it was asked to end: that of `checkpoint/signals.py`, whose import takes
seconds."""
DISK_FULL = 74
"""Exit code of a command that could not write because the disk is full (EX_IOERR of sysexits.h)."""


COMMAND = "MEGATRON_R1_STAGE_COMMAND"
"""Environment variable with what runs a verb instead of this Python: a script that starts it on other nodes."""


class StageError(UserError, RuntimeError):
    """A stage, or a service that it needs, did not do its work."""


def environment() -> dict[str, str]:
    """That of stages and services: one OpenMP thread a process, unless told otherwise.

    Two on busy cores cost many times what they gain.
    """
    return {"OMP_NUM_THREADS": "1"} | os.environ


def run_verb(verb: str, config: Path, lock: int, quiet: bool, watch: Callable[[], None]) -> tuple[int, int]:
    """Run `megatron-r1 <verb> <config>` with its console passed through, and wait for it.

    SIGTERM and SIGUSR1 are handed on to it, and it takes the time that it needs to save; Ctrl-C gives it a minute. When
    one was handed on and the verb has ended, this process hears no more of them: it ends with the verb's code.

    Args:
        verb: as on the command line.
        config: its run file.
        lock: a file descriptor that stays open until nothing of the verb is left.
        quiet: its standard output goes to standard error.
        watch: called about once a second, until a signal comes; what it raises ends the verb.

    Returns:
        The verb's exit code, 128 + the signal if one killed it; and the signal that was handed on, or 0.
    """
    program = shlex.split(os.environ.get(COMMAND, "")) or [sys.executable, "-m", "megatron_r1.cli"]
    command = [*program, *verb.split(), str(config)]
    keeper = subprocess.Popen(
        [sys.executable, "-m", "megatron_r1.recipe.keeper", str(os.getpid()), *command],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if quiet else None,
        start_new_session=True,
        pass_fds=[lock],
    )
    asked = 0

    def hand_on(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = signum
        keeper.send_signal(signum)

    before = {signum: signal.signal(signum, hand_on) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        while True:
            try:
                code = keeper.wait(POLL_SECONDS)
                return code if code >= 0 else 128 - code, asked
            except subprocess.TimeoutExpired:
                if not asked:  # services may be ending by the same signal
                    watch()
    except BaseException:  # Ctrl-C too
        keeper.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(END_SECONDS)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if asked else handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()
