"""The problems of a run by position, without those that are held out.

Problem `index` of a stream is the same whatever was drawn before, so there is nothing to save or restore.
"""

from array import array
from functools import lru_cache
from typing import Protocol

from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.tasks.mixture import Mixture
from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed

PATIENCE = 1000
"""Rejected problems in a row after which a task counts as exhausted."""


class Stream(Protocol):
    """Problems by position."""

    def problem(self, index: int) -> Problem:
        """Problem number `index`.

        Raises:
            ConfigError: the task yields nothing but excluded problems.
        """
        ...


def stream(task: Task, seed: int, exclude: frozenset[str]) -> Stream:
    """Stream `seed` of a task without the problems whose text is in `exclude`.

    Of a task with a size, each problem that is left comes once an epoch; a mixture keeps its shares.

    Raises:
        ConfigError: all problems of a task with a size are excluded.
    """
    if isinstance(task, Mixture):
        return _Mixed(task, seed, exclude)
    return _Endless(task, seed, exclude) if task.size is None else _Finite(task, task.size, seed, exclude)


class _Endless:
    """An excluded problem is replaced by the one at its place in another stream."""

    def __init__(self, task: Task, seed: int, exclude: frozenset[str]) -> None:
        self._task, self._seed, self._exclude = task, seed, exclude

    def problem(self, index: int) -> Problem:
        seed = self._seed
        for attempt in range(PATIENCE):
            problem = self._task.problem(seed, index)
            if problem.text not in self._exclude:
                return problem
            seed = stream_seed("substitute", self._seed, attempt)
        raise dry(self._task, len(self._exclude))


class _Finite:
    """The order of an epoch is the task's, with the excluded problems taken out."""

    def __init__(self, task: Task, size: int, seed: int, exclude: frozenset[str]) -> None:
        self._task, self._size, self._seed, self._exclude = task, size, seed, exclude
        self._places = lru_cache(maxsize=2)(self._allowed)
        self._count = len(self._places(0)) if exclude else size
        if not self._count:
            raise dry(task, len(exclude))

    def problem(self, index: int) -> Problem:
        if self._exclude:
            epoch, place = divmod(index, self._count)
            index = self._places(epoch)[place]
        return self._task.problem(self._seed, index)

    def _allowed(self, epoch: int) -> "array[int]":
        """Positions of an epoch, counted over all epochs, whose problems are not excluded. [count]"""
        places = range(epoch * self._size, (epoch + 1) * self._size)
        return array("Q", [p for p in places if self._task.problem(self._seed, p).text not in self._exclude])


class _Mixed:
    """Each member has a stream of its own."""

    def __init__(self, task: Mixture, seed: int, exclude: frozenset[str]) -> None:
        self._task, self._seed = task, seed
        self._streams = {n: stream(member, task.member_seed(seed, n), exclude) for n, member in task.tasks.items()}

    def problem(self, index: int) -> Problem:
        name, number = self._task.place(self._seed, index)
        return self._task.label(name, self._streams[name].problem(number))


def dry(task: Task, taken: int) -> ConfigError:
    """A task has no problem left that may be drawn."""
    return ConfigError(
        f"task {task.name!r} ran dry: all its questions, or its last {PATIENCE}, were held out or seen before "
        f"({taken:,} texts are taken); ask for fewer questions or widen the task's options"
    )
