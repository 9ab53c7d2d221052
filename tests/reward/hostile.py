"""Rewards that do what a verifier does on a bad day; the response's text says which."""

import os
import signal
import sys
import time
from typing import ClassVar

from megatron_r1.config.section import Section
from megatron_r1.errors import ConfigError
from megatron_r1.types import Group


class Hostile:
    """Isolated: sleeps, exits, raises, segfaults; otherwise the number in the text."""

    class Config(Section):
        pass

    isolated: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, group: Group) -> list[float | None]:
        assert len(group.samples) == 1
        text = group.samples[0].text
        if text == "hang":
            time.sleep(3600)
        if text == "exit":
            os._exit(3)
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


class Careless:
    """Inline: returns what it is told, whatever the group."""

    class Config(Section):
        scores: list[str]

    isolated: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, group: Group) -> list[float | None]:
        return [float(score) for score in self.config.scores]
