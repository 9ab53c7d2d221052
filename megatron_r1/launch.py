"""Several processes, on one node or more: the same command in each, under torchrun's agent."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

LAUNCHER = "MEGATRON_R1_LAUNCHER"
"""Environment variable that tells the processes who started them."""
NODES, RENDEZVOUS, ADDRESS = "MEGATRON_R1_NODES", "MEGATRON_R1_RENDEZVOUS", "MEGATRON_R1_ADDRESS"
"""Environment variables of a run on several nodes, each of which starts the same command: how many there are,
`host:port` of the one where they meet, where the others reach this one."""
POLL_SECONDS = 0.5
REFUSED = 2
"""Exit code of a process whose input is bad, as `cli.main` has it."""


def nodes() -> int:
    """How many nodes the same command was started on."""
    return int(os.environ.get(NODES, "1"))


def relaunch(processes: int, arguments: list[str], output: Path | None = None) -> int:
    """Run `megatron-r1 <arguments>` in `processes` processes on this node and wait for them.

    SIGTERM and SIGUSR1 are handed on to them, and their end is waited for; Ctrl-C ends them. Returns the exit code of
    the lowest rank that failed by itself. One that was killed is named, with the step that it has noted in `output`. A
    run on one node that is refused at its start leaves nothing there.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megatron_r1.train.heartbeat import leave_nothing, missing

    made = missing(output) if output else []
    logging.disable(logging.ERROR)  # the processes themselves say what went wrong
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=nodes(),
        max_nodes=nodes(),
        nproc_per_node=processes,
        run_id=str(os.getpid()) if nodes() == 1 else "megatron-r1",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if nodes() == 1 else os.environ[RENDEZVOUS],
        local_addr=os.environ.get(ADDRESS) if nodes() > 1 else None,
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # those at which the agent itself ends all processes
    )
    relay = _Relay(psutil.Process())
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, relay)
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_r1.cli", *arguments)
    except ChildFailedError as error:
        _name_killed(error.failures, output)
        codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
        codes = [code if code > 0 else 128 - code for code in codes]
        # The agent ends the others by SIGTERM, then SIGKILL, which say nothing about why the run failed.
        ended = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
        code = next((code for code in codes if code not in ended), min(codes))
        if code == REFUSED and output and nodes() == 1:
            leave_nothing(output, processes, made)
        return code
    except SignalException as error:
        return 128 + error.sigval
    finally:
        relay.rest()
    return 0


def _name_killed(failures: Mapping[int, Any], output: Path | None) -> None:
    """Say which ranks were ended by a signal that nobody sends in order."""
    from megatron_r1.train.heartbeat import last_words

    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            print(f"megatron-r1: {last_words(output, rank)} was ended by {name}", file=sys.stderr)


class _Relay:
    """Hands signals on to the processes of the launcher; where there are none yet, ends it.

    They are in sessions of their own, so a signal to the launcher's process group does not reach them. A second signal
    may come while this runs, so it is not this that loads psutil; or when they have ended, and the code is theirs.
    """

    def __init__(self, launcher: Any) -> None:
        self._launcher = launcher
        self._told = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        import psutil

        ranks = self._launcher.children()
        if not ranks and not self._told:
            sys.exit(128 + signum)
        self._told = True
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)

    def rest(self) -> None:
        """They have ended: signals change nothing any more, if one was handed on."""
        for signum in (signal.SIGTERM, signal.SIGUSR1) if self._told else ():
            signal.signal(signum, signal.SIG_IGN)


def end_with_launcher() -> None:
    """Make this process end when the one that launched it is gone; does nothing in a process of any other origin.

    torchrun starts each process in a session of its own, so one that is killed outright would leave them behind.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or "RANK" not in os.environ:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(POLL_SECONDS)
        # Not by an exception: the main thread may be waiting for another rank inside a collective.
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()
