"""What the processes of a box use, as the kernel tells it outside of the box.

`RLIMIT_AS` counts one process at a time, and `RLIMIT_NPROC` nothing at all where the box's user is root outside.
"""

from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
FIELDS = ("VmRSS", "VmSwap", "FDSize")
FREE_DESCRIPTORS = 64


@dataclass(frozen=True)
class Usage:
    """Of all processes below one, itself included."""

    tasks: int
    """Processes and their threads."""
    memory_kib: int
    """Resident and swapped out."""
    descriptors: int
    """Room for open files, pipes and sockets, beyond what every process has."""


def room(leader: int) -> int:
    """For how many descriptors a process has room that has opened none: as much as those above it had when they forked.

    A shell that holds a pipe as number 251 gives room for 256 to every process below it.
    """
    try:
        return max(FREE_DESCRIPTORS, _status(leader).get("FDSize", 0))
    except (FileNotFoundError, ProcessLookupError):
        return FREE_DESCRIPTORS


def usage(leader: int, most_tasks: int, free: int = FREE_DESCRIPTORS) -> Usage:
    """Walk the tree of processes below `leader`; it ends early when there are more than `most_tasks`.

    `free`: descriptors of each process that do not count (`room`).
    """
    tasks = memory = descriptors = 0
    waiting = [leader]
    while waiting and tasks <= most_tasks:
        pid = waiting.pop()
        try:
            threads = list((PROC / f"{pid}/task").iterdir())
            for thread in threads:
                waiting += map(int, (thread / "children").read_text().split())
            status = _status(pid)
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        tasks += len(threads)
        memory += status.get("VmRSS", 0) + status.get("VmSwap", 0)
        descriptors += max(0, status.get("FDSize", 0) - free)
    return Usage(tasks, memory, descriptors)


def _status(pid: int) -> dict[str, int]:
    """The numbers of `FIELDS`."""
    lines = (PROC / f"{pid}/status").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name in FIELDS}
