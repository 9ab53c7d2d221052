"""Looking at processes that may end meanwhile."""

import time
from collections.abc import Iterable

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Empty once the process has ended, whether or not its parent has noticed."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one, too
        return []


def outlive(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run when so many seconds have gone by; returns as soon as none does.

    `psutil.wait_procs` raises FileNotFoundError where a process ends at the wrong moment (psutil 7, pidfd_open).
    """
    deadline, left = time.monotonic() + seconds, list(processes)
    while (left := [process for process in left if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
