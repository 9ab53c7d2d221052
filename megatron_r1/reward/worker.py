"""What runs in a verifier's process: rewards that may hang or crash.

Messages out: one `Ready`, then one `Verdict` for every sample of every request, in order; or a `UserError`,
which ends the run.
"""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection

from megatron_r1.config import component
from megatron_r1.config.section import Component
from megatron_r1.errors import UserError
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group

Call = tuple[str, Group]
"""The name of an isolated reward, and samples of one group for it."""


@dataclass(frozen=True)
class Ready:
    """The worker has imported and built all it needs."""


@dataclass(frozen=True)
class Verdict:
    """One reward of one sample, or what came instead."""

    score: float | None
    error: str | None = None
    timed_out: bool = False


def serve(connection: Connection, rewards: dict[str, Component], tasks: Sequence[Component]) -> None:
    """Answer requests (lists of `Call`) until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then stops its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        for task in tasks:
            component.build("task", task)
        built: dict[str, Reward] = {name: component.build("reward", section) for name, section in rewards.items()}
        for reward in built.values():
            reward.prepare()
        connection.send(Ready())
        while True:
            for name, group in connection.recv():
                for sample in group.samples:
                    connection.send(_score(built[name], replace(group, samples=[sample])))
    except UserError as error:
        connection.send(error)
    except EOFError:
        pass


def _score(reward: Reward, group: Group) -> Verdict:
    try:
        return Verdict(reward(group)[0])
    except UserError:
        raise
    except BaseException as error:  # whatever third-party code does, sys.exit() included
        return Verdict(None, error=f"{type(error).__name__}: {error}")


def _leave_with_parent() -> None:
    """A run that is killed outright cannot stop its workers."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
