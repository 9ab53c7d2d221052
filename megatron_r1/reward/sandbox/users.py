"""Whom programs run as when the trainer is root.

Then the only user that bubblewrap can map is root's own, and though powerless in its namespaces it would own the
machine's files: it could chmod /dev/null, and the kernel would not count its processes. So root gives each box a
user of its own, one that nobody else has.
"""

import contextlib
import itertools
import os
import secrets
import subprocess
from pathlib import Path

from megatron_r1.errors import EngineError

FIRST = 0x70000000
"""As the kernel numbers users: the first that systemd leaves to nobody (docs/UIDS-GIDS.md of systemd)."""
COUNT = 65536
MAP = f"0 0 1\n1 {FIRST} {COUNT}\n"
CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
"""What it takes to become that user; gone with it."""


def needed() -> bool:
    """Whether this process owns the machine's devices."""
    return Path("/dev/null").stat().st_uid == os.geteuid()


class Users:
    """A user namespace in which root sets boxes up, and the users it has for them."""

    def __init__(self) -> None:
        """Make the namespace.

        Raises:
            EngineError: root has not the right to do so.
        """
        self._next = itertools.count(secrets.randbelow(COUNT))  # other workers count too
        try:
            self.namespace = _namespace()
        except OSError as error:
            raise EngineError(
                f"root could not make a user namespace for the sandbox ({error}). Run as a user other than root, or "
                "give the container more rights (docker run --privileged)."
            ) from None

    def become_next(self) -> list[str]:
        """Start of a command that runs the rest as a user of its own, and ends it with its parent."""
        user = str(1 + next(self._next) % COUNT)
        rights = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        return ["/usr/bin/setpriv", "--reuid", user, "--regid", user, *rights, "--pdeathsig", "KILL", "--"]


def _namespace() -> int:
    """A descriptor of a user namespace with the users of `MAP`."""
    with subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        if not holder.stdout.read(1):  # it echoes when it is in the namespace
            raise PermissionError("unshare --user failed")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(MAP)
        return os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
