"""The command, forked from a process that has imported what it needs: it starts at once, and real signals end it.

A command of several processes forks its ranks-to-be before it has begun. torchrun's agent then hands each what it would
have executed. So parents, sessions, environments, signals and exit codes are those of `megatron-r1`; only the imports,
seconds in each process, are saved.
"""

import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_r1.cli import main
from tests.end_to_end.runs import ROOT, Command

_FORK = multiprocessing.get_context("fork")
_IMPORTED = (
    "megatron_r1.config.runs",
    "megatron_r1.train.pretrain",
    "megatron_r1.train.rl",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.launcher.api",
)
_PR_SET_PDEATHSIG = 1
"""Linux: end with the process that has started this one."""


def load() -> None:
    """Import what commands need. No thread may run yet."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    os.chdir(ROOT)
    for module in _IMPORTED:
        importlib.import_module(module)


class Forked:
    """A forked process with as much of `subprocess.Popen` as `Command` and torchrun's agent use."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process = _FORK.Process(target=target, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, sent: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmCommand(Command):
    """`megatron-r1 <verb> <run file> --parallel.processes=2`."""

    RANKS = 2

    def __init__(self, verb: str, run_file: Path) -> None:
        super().__init__(verb, run_file, f"--parallel.processes={self.RANKS}")

    def launch(self, *arguments: str) -> Any:
        self.errors.write_bytes(b"")
        return Forked(_launcher, list(arguments), self.errors)


def _launcher(arguments: list[str], errors: Path) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for path, descriptor in ((Path(os.devnull), 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    _hand_out([_Rank() for _ in range(WarmCommand.RANKS)])
    sys.exit(main(arguments))


def _hand_out(ranks: "list[_Rank]") -> None:
    """Have torchrun's agent take these in place of processes of its own."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def take(args: tuple[str, ...], env: Mapping[str, str], **_: Any) -> _Rank:
        rank = ranks.pop(0)
        rank.begin(args, env)
        return rank

    subprocess_handler.Popen = take


class _Rank(Forked):
    """A process that waits to be one of the command's; gone if that is gone before."""

    def __init__(self) -> None:
        theirs, self._work = _FORK.Pipe(duplex=False)
        super().__init__(_rank, theirs, self._work)
        theirs.close()

    def begin(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._work.send((command, dict(environment)))


def _rank(work: Connection, launchers: Connection) -> None:
    launchers.close()
    try:
        command, environment = work.recv()
    except EOFError:
        return
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(list(command[command.index("megatron_r1.cli") + 1 :])))
