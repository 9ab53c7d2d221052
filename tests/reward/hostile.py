"""Rewards that do what a verifier does on a bad day; the response's text says which."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

from megatron_r1.config.section import Section
from megatron_r1.errors import ConfigError
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group


class Hostile(Reward):
    """Isolated: sleeps, exits, raises, segfaults, is killed; otherwise the number in the text."""

    isolated: ClassVar[bool] = True

    def __call__(self, group: Group) -> list[float | None]:
        assert len(group.samples) == 1
        text = group.samples[0].text
        if text == "hang":
            time.sleep(3600)
        if text == "exit":
            os._exit(3)
        if text.startswith("killed"):  # once, or each time
            marker = Path(text.split()[-1])
            if text.startswith("killed again") or not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return [5.0]
        if text == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "sys.exit":
            sys.exit(1)
        if text == "config":
            raise ConfigError("this run file is wrong")
        if text == "none":
            return [None]
        if text == "torch":
            return [float("torch" in sys.modules)]
        if text == "pid":
            return [float(os.getpid())]
        return [float(text)]


class Careless(Reward):
    """Inline: returns what it is told, whatever the group."""

    class Config(Section):
        scores: list[str]

    def __call__(self, group: Group) -> list[float | None]:
        return [float(score) for score in self.config.scores]


class Patient(Hostile):
    """As `Hostile`, with all the time in the world; its numbers say whether the answer is right."""

    judges_correctness: ClassVar[bool] = True

    @property
    def deadline(self) -> float | None:
        return 600.0


class Echo(Reward):
    """Inline: what was judged before it is called."""

    needs_correctness: ClassVar[bool] = True

    def __call__(self, group: Group) -> list[float | None]:
        return [None if sample.correct is None else float(sample.correct) for sample in group.samples]


class Unprepared(Hostile):
    """Needs what this machine does not have, and gives less than 0."""

    @property
    def failure_score(self) -> float:
        return -1.0

    def prepare(self) -> None:
        if os.environ.get("TEST_UNPREPARED"):
            raise ConfigError("this machine has no abacus")


class Undecided(Hostile):
    """Asks for what cannot be: a verdict of others, in a process that does not see them."""

    needs_correctness: ClassVar[bool] = True


class Stranger:
    """Not a reward at all."""

    Config = Section

    def __init__(self, config: Section) -> None:
        self.config = config
