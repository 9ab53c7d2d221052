"""Stands between a recipe and the verb it runs, so that the verb never goes on when the recipe has been killed.

    python -m megatron_r1.recipe.keeper <process id of the recipe> <command> [argument ...]

It leads a process group of its own with the verb in it. SIGTERM and SIGUSR1 are handed on to the verb alone, which
saves, unwinds, and closes its engines and workers in its own time; the exit code is the verb's. When the recipe is
gone, however it ended, the verb is asked by SIGTERM, and after a while the whole group is killed. Standard library
only: it has to start at once.
"""

import os
import signal
import subprocess
import sys

POLL_SECONDS = 0.25
GRACE_SECONDS = 30.0
"""Between asking the verb of a killed recipe to end and forcing it."""


def main() -> int:
    """Run the command of `sys.argv`; its exit code, 128 + the signal if one killed it."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    verb = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    # Not before: the verb would inherit what is ignored. Ctrl-C is the recipe's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for asking in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(asking, lambda signum, frame: verb.send_signal(signum))
    while _alive(verb, POLL_SECONDS):
        if os.getppid() != parent:
            verb.terminate()
            _alive(verb, GRACE_SECONDS)
            os.killpg(0, signal.SIGKILL)
    for asking in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(asking, signal.SIG_IGN)  # Python's end would make it deadly, and the code is the verb's
    return verb.returncode if verb.returncode >= 0 else 128 - verb.returncode


def _alive(verb: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait a while; is the verb still running?"""
    try:
        verb.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
