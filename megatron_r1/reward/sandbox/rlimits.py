"""Boxes without namespaces, for machines whose kernel refuses them. Weaker; to be chosen knowingly.

A program is limited in time, memory, processes, files and output as it is with bubblewrap; it has an empty
environment, no network (it cannot open a socket), and none of the system calls that `seccomp.py` refuses.

NOT protected, since it runs as the user of the trainer with that user's files in sight:

* it can read whatever that user can read: home, keys, data sets, the answers, this project;
* it can write and delete whatever that user can;
* it can see that user's other processes, their environments in /proc included, and kill them, the trainer too;
* what it writes outside of its folder outlives it, and so do processes of a program that has killed its box's own;
* the size of its folder is limited file by file only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from megatron_r1.reward.sandbox.bundle import BOOT
from megatron_r1.reward.sandbox.inside.process import descendants
from megatron_r1.reward.sandbox.seccomp import program as seccomp_program

REMOVE = 'rm -rf -- "$1" 2>/dev/null || { chmod -R u+rwx -- "$1"; rm -rf -- "$1"; }'
"""Folders of any depth, which rmtree does not manage, and those that a program has shut."""


class ResourceLimits:
    """Starts boxes."""

    def __init__(self) -> None:
        """Build the filter of system calls.

        Raises:
            EngineError: there is none for this processor.
        """
        self._filter = seccomp_program(sockets=False).hex()

    def start(self, tmp_mib: int) -> "PlainProcesses":
        """Start one box; whether that works is known when it answers."""
        folder = Path(tempfile.mkdtemp(prefix="megatron-r1-"))
        return PlainProcesses(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", BOOT, self._filter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8"},
                cwd=folder,
                start_new_session=True,
            ),
            folder,
        )

    def close(self) -> None:
        """No more boxes; there is nothing to let go of."""


class PlainProcesses:
    """The processes of one box: the first adopts those whose parents end, so that they stay below it."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.process = process
        self._folder = folder
        self._lock = threading.Lock()

    def leader(self) -> int:
        return self.process.pid

    def files(self) -> int:
        return sum(1 for _ in os.scandir(self._folder))

    def end(self) -> None:
        with self._lock:
            if self.process.returncode is not None:
                return
            self.process.send_signal(signal.SIGSTOP)  # else it would start what its next command asks for
            while below := [pid for pid in descendants(self.process.pid) if _alive(pid)]:
                for pid in below:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            subprocess.run(["sh", "-c", REMOVE, "sh", str(self._folder)], check=False)


def _alive(pid: int) -> bool:
    """False for one that is dead and has not been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
