"""Looking at processes that may end meanwhile."""

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Empty once the process has ended, whether or not its parent has noticed."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one, too
        return []
