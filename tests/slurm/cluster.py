"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of a few nodes, all on loopback."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.end_to_end.runs import ROOT, is_free

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PORTS = random.sample(range(16800, 17800, 10), 100)
"""In no order, so that two that are started at the same time do not take the same."""
CONFIG = """
ClusterName=tests{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,requeue_delay=0
SlurmdTimeout=10
KillWait=60
MinJobAge=300
JobRequeue=0
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=4000
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def lacking() -> str:
    """Why no Slurm can be started here; empty if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (requirements/slurm.sh)"
    return "" if os.getuid() == 0 else "slurmd and slurmctld are started as root"


class Slurm:
    """A context manager that leaves no process behind.

    Args:
        folder: of keys, state and logs.
        nodes: how many; they are called n1, n2, ...
    """

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Slurm":
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        first = next(first for first in PORTS if all(is_free(first + node) for node in range(len(self.nodes) + 1)))
        settings = CONFIG.format(
            host=socket.gethostname(), folder=self.folder, port=first, first=first + 1, last=first + len(self.nodes),
            nodes=f"n[1-{len(self.nodes)}]",
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(settings)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        try:
            files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
            own = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
            self._start("munged", ["munged", "--foreground", "--force", *own])
            until((self.folder / "munge.socket").exists, 120)
            self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
            for node in self.nodes:
                self.start_node(node)
            until(
                lambda: self.states() == dict.fromkeys(self.nodes, "idle"),
                180,
                lambda: f"{self.states()}; {self.log()[-3000:]}",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.call("scancel", "--full", "--user=root", check=False)
            wait(lambda: not self.call("squeue", "--noheader", "--states=running,completing", check=False), 15)
        for node in self.nodes:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            self._stop(name)
        for process in self.processes():  # jobs outlive daemons
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def start_node(self, node: str) -> None:
        """Have its slurmd run."""
        self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")])

    def kill_node(self, node: str) -> None:
        """What a power failure does: slurmd, and all that runs on the node, at once."""
        self._stop(node)
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """All that belongs to a node, or to any."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if ours and node in {None, environment.get("SLURMD_NODENAME")}:
                found.append(process)
        return found

    def states(self) -> dict[str, str]:
        """Node -> state."""
        lines = self.call("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).split("\n")
        return dict(line.split() for line in lines if line)

    def call(self, *command: str, check: bool = True) -> str:
        """Standard output of a command of Slurm."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split("\n")[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, name: str = "slurmctld") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, command: list[str]) -> None:
        """A daemon that ends with this process, however that ends."""
        supervised = [sys.executable, "-m", "megatron_r1.rollout.supervisor", str(os.getpid()), *command]
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                supervised, env=self.environment | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def _stop(self, name: str) -> None:
        if daemon := self._daemons.pop(name, None):
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def wait(happened: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    """Did it happen in time?"""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def until(happened: Callable[[], bool], seconds: float, told: Callable[[], str] = lambda: "") -> None:
    assert wait(happened, seconds), f"did not happen within {seconds:g} s; {told()}"
