"""Starts the same command once more in several processes, through torchrun."""

import subprocess
import sys


def relaunch(processes: int, arguments: list[str]) -> int:
    """Run `megatron-r1 <arguments>` in `processes` processes on this node and wait for them.

    Returns the exit code. SIGTERM and Ctrl-C reach torchrun, which stops its processes.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with subprocess.Popen([*command, "-m", "megatron_r1.cli", *arguments]) as torchrun:
        try:
            return torchrun.wait()
        except BaseException:
            torchrun.terminate()
            torchrun.wait()
            raise
