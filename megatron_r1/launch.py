"""One node, several processes: the same command in each, under torchrun's agent."""

import logging
import os
import signal
import sys
import threading
import time

LAUNCHER = "MEGATRON_R1_LAUNCHER"
"""Environment variable that tells the processes who started them."""
POLL_SECONDS = 0.5


def relaunch(processes: int, arguments: list[str]) -> int:
    """Run `megatron-r1 <arguments>` in `processes` processes on this node and wait for them.

    SIGTERM and Ctrl-C are handed on to them. Returns the exit code of the lowest rank that failed by itself.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the processes themselves say what went wrong
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_r1.cli", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
        codes = [code if code > 0 else 128 - code for code in codes]
        # The agent ends the others by SIGTERM, which says nothing about why the run failed.
        return next((code for code in codes if code != 128 + signal.SIGTERM), codes[0])
    except SignalException as error:
        return 128 + error.sigval
    return 0


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
