"""Which process of a command is killed, and when."""

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.end_to_end.runs import Command, checkpoint

VICTIMS = {
    "pretrain": ("launcher", "rank 0", "rank 1"),
    "rl": ("launcher", "rank 0", "rank 1", "supervisor", "vLLM server", "vLLM engine", "reward worker"),
}
DEADLY = ("launcher", "rank 0", "rank 1")
"""Those without which no command goes on."""
MOMENTS = ("start", "step", "checkpoint", "end")
"""Before a command's first step, after it, while a checkpoint is written, after the run's last step."""
_STEP = re.compile(r"^step +(\d+)/", re.MULTILINE)
POLL_SECONDS = 0.005
_SEARCH_SECONDS = 0.05
"""Between two looks at all processes, which cost more."""


@dataclass(frozen=True)
class Kill:
    """One disturbance."""

    verb: str
    victim: str
    moment: str
    share: float
    """How much of the moment has passed, from 0 to 1."""

    def __str__(self) -> str:
        return f"{self.verb}: {self.victim}, {self.share:.0%} into {self.moment}"


def draw(verb: str, count: int, chance: random.Random) -> list[Kill]:
    """Every pair of victim and moment once, before any comes again: their numbers have no common divisor."""
    victims, moments = (chance.sample(names, len(names)) for names in (VICTIMS[verb], MOMENTS))
    return [Kill(verb, victims[n % len(victims)], moments[n % len(moments)], chance.random()) for n in range(count)]


def members(command: Command) -> dict[str, psutil.Process]:
    """The processes of a command that have not ended, by what they are."""
    try:
        launcher = psutil.Process(command.process.pid)
        ranks = sorted((child for child in launcher.children() if _leads(child)), key=lambda child: child.pid)
        found = {"launcher": launcher, **{f"rank {number}": rank for number, rank in enumerate(ranks)}}
        for child in ranks[0].children(recursive=True) if ranks else []:
            found[_name(child, ranks[0])] = child
        return {name: process for name, process in found.items() if process.status() != psutil.STATUS_ZOMBIE}
    except (psutil.NoSuchProcess, ProcessLookupError):  # one ended meanwhile
        return {}


def _leads(child: psutil.Process) -> bool:
    """Whether a rank has begun: torchrun gives each a session of its own."""
    return os.getsid(child.pid) == child.pid


def _name(child: psutil.Process, rank: psutil.Process) -> str:
    line = " ".join(child.cmdline())
    marks = {
        "rollout.supervisor": "supervisor",  # the server's command is part of its own
        "api_server": "vLLM server",
        "EngineCore": "vLLM engine",
    }
    if "spawn_main" in line and child.ppid() == rank.pid:
        return "reward worker"
    return next((name for mark, name in marks.items() if mark in line), line)


@dataclass
class Seconds:
    """How long each moment of an undisturbed run lasts."""

    start: float
    step: float
    checkpoint: float
    end: float


class Watch:
    """Says when a moment of a command has come. Made as the command starts."""

    def __init__(self, command: Command, output: Path, steps: int) -> None:
        self._command, self._output, self._steps = command, output, steps
        self._began, self._stale = time.monotonic(), self._partial()
        self.happened: dict[str, Callable[[], bool]] = {
            "start": lambda: True,
            "step": lambda: self.steps() > 0,
            "checkpoint": lambda: bool(self._partial() - self._stale),
            "end": lambda: self.steps(steps) > 0 or checkpoint(output, steps)(),
        }

    def steps(self, last: int | None = None) -> int:
        """How many steps this command has finished; with `last`, whether this one is among them."""
        numbers = [int(number) for number in _STEP.findall(self._command.message())]
        return numbers.count(last) if last else len(numbers)

    def until(self, happened: Callable[[], bool], pause: float = POLL_SECONDS) -> bool:
        """Wait for it; False where the command ends before."""
        while not happened():
            if self._command.process.poll() is not None:
                return False
            time.sleep(pause)
        return True

    def victim(self, kill: Kill, seconds: Seconds) -> psutil.Process | None:
        """The process to kill, when the moment has come; None where the command ends before."""
        if kill.moment == "start" and self.steps():
            self.until(lambda: False)
        if not self.until(self.happened[kill.moment]):
            return None
        since = self._began if kill.moment == "start" else time.monotonic()
        due = since + kill.share * getattr(seconds, kill.moment)
        self.until(lambda: time.monotonic() >= due)
        if not self.until(lambda: kill.victim in members(self._command), _SEARCH_SECONDS):
            return None
        return members(self._command).get(kill.victim)

    def _partial(self) -> set[tuple[str, int, int]]:
        """Checkpoints that are being written or removed; what was done to one last."""
        found = set()
        for path in self._output.glob("checkpoints/*.partial"):
            try:
                found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
            except FileNotFoundError:
                continue
        return found
