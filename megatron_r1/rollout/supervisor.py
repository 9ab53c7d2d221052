"""Stands between the run and a vLLM server, so that none of vLLM's processes outlives the run however it ends.

    python -m megatron_r1.rollout.supervisor <process id of the run> <command> [argument ...]

A vLLM server is a tree of processes; killing its root can leave the rest behind, and a run that is itself killed
(SIGKILL, out of memory) can do nothing at all. The supervisor leads a process group of its own, starts the command in
it, and ends the whole group when the command exits, when it is told to (SIGTERM), or when its parent is gone. It uses
the standard library alone: it must start at once and stay small.
"""

import os
import signal
import subprocess
import sys

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0
"""Between asking the group to end, which lets vLLM remove its shared memory, and forcing it."""


def main() -> None:
    """Run the command of `sys.argv` and end its process group; returns only by being killed with it."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while _alive(child) and os.getppid() == parent:
            pass
        if child.returncode is not None:
            print(f"supervisor: the server exited with code {child.returncode}", flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"supervisor: the server did not end in {GRACE_SECONDS:g} s and is killed", flush=True)
        os.killpg(0, signal.SIGKILL)


def _alive(child: subprocess.Popen[bytes]) -> bool:
    """Wait a moment; is the child still running?"""
    try:
        child.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


if __name__ == "__main__":
    main()
