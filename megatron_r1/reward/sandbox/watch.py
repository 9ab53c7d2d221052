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


def usage(leader: int, most_tasks: int) -> Usage:
    """Walk the tree of processes below `leader`; it ends early when there are more than `most_tasks`."""
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
        descriptors += max(0, status.get("FDSize", 0) - FREE_DESCRIPTORS)
    return Usage(tasks, memory, descriptors)


def _status(pid: int) -> dict[str, int]:
    """The numbers of `FIELDS`."""
    lines = (PROC / f"{pid}/status").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name in FIELDS}
