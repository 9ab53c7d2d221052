"""Boxes by bubblewrap: namespaces for everything, no capabilities, and a file system with next to nothing in it.

A program finds the system's programs and libraries and Python's standard library, read-only; its own /proc, read-only;
/dev/null and random numbers; and /tmp, which has a size and is gone with the box. No network, no home, no
environment, no other processes.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox import users, view
from megatron_r1.reward.sandbox.seccomp import program as seccomp_program

NOBODY = "65534"
"""Its user and group, where the trainer is not root."""
NAMESPACES = ("pid", "ipc", "net", "uts", "cgroup-try")


class Bubblewrap:
    """Starts boxes."""

    def __init__(self) -> None:
        """Find bwrap and build its command.

        Raises:
            EngineError: there is no bwrap, or no filter of system calls for this processor.
        """
        self._program = find()
        self._filter = seccomp_program()
        self._users = users.Users() if users.needed() else None

    def start(self, tmp_mib: int) -> "Namespaces":
        """Start one box; whether that works is known when it answers."""
        reading, writing = os.pipe()
        try:
            os.write(writing, self._filter)  # smaller than a pipe
            os.close(writing)
            return Namespaces(
                subprocess.Popen(
                    [*self._command(tmp_mib), "--seccomp", str(reading), "--", *self._inner_command()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=view.environment(),
                    pass_fds=[reading] if self._users is None else [reading, self._users.namespace],
                    cwd="/",
                )
            )
        finally:
            os.close(reading)

    def close(self) -> None:
        """No more boxes."""
        if self._users is not None:
            os.close(self._users.namespace)

    def _command(self, tmp_mib: int) -> list[str]:
        options = [f"--unshare-{name}" for name in NAMESPACES]
        options += ["--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "box", "--cap-drop", "ALL"]
        if self._users is None:
            options += ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
        else:
            options += ["--userns", str(self._users.namespace)]
            for capability in users.CAPABILITIES:
                options += ["--cap-add", capability]
        options += view.file_system()
        options += ["--size", str(tmp_mib << 20), "--perms", "1777", "--tmpfs", view.TMP, "--chdir", view.TMP]
        return [self._program, *options, "--remount-ro", "/"]

    def _inner_command(self) -> list[str]:
        return [*(self._users.become_next() if self._users else ()), *view.python_command()]


class Namespaces:
    """The processes of one box: bwrap, which waits, and the first process of a pid namespace."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self._leader: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def leader(self) -> int:
        if self._leader is None:
            pid = self.process.pid
            try:
                child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
                self._leader = child, os.pidfd_open(child)
            except (OSError, IndexError):
                raise EngineError("it is over") from None
        return self._leader[0]

    def files(self) -> int:
        try:
            space = os.statvfs(f"/proc/{self.leader()}/root/tmp")
        except (OSError, EngineError):  # it ended meanwhile
            return 0
        return space.f_files - space.f_ffree

    def end(self) -> None:
        """The death of the first process is that of all. bwrap then waits for it, so that nobody else has to."""
        with self._lock:
            if self.process.returncode is not None:
                return
            try:
                self.leader()
            except EngineError:  # or it has not come to that
                self.process.kill()
            if self._leader is not None:
                pidfd = self._leader[1]
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            self.process.wait()


def find() -> str:
    """The path of bwrap: on PATH, or beside this Python (where requirements/bubblewrap.sh puts it).

    Raises:
        EngineError: it is in neither place.
    """
    beside = Path(sys.executable).parent
    path = shutil.which("bwrap") or shutil.which("bwrap", path=str(beside))
    if path is None:
        raise EngineError(f"no bwrap on PATH or in {beside}.{explanation('')}")
    return path


def explanation(said: str) -> str:
    """What to do about a box that does not start."""
    if "Unknown option" in said:
        step = "This bubblewrap is too old; install version 0.8 or newer, or put that bwrap beside this Python."
    elif not said:
        step = "Install bubblewrap (apt-get install bubblewrap; without root: requirements/bubblewrap.sh VENV)."
    else:
        step = (
            "The kernel refuses user namespaces. As root on the host: sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces=10000, whichever exists. "
            "In a container: docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
            "--security-opt systempaths=unconfined, or its likes."
        )
    return (
        f'\n{step}\nOr use a remote executor. Or set sandbox = "rlimits", knowing that programs of the policy can then '
        "read what this user can read."
    )
