"""Tasks with a fixed number of problems: each comes once an epoch, in an order of the epoch's own."""

import random
from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

from megatron_r1.data.tasks.base import Problem, Task, dry
from megatron_r1.seeds import stream_seed


class FiniteTask(Task):
    """A task whose problems are numbered from 0 to `size` - 1; a subclass says what they are."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many problems there are, at least 1."""

    @abstractmethod
    def row(self, number: int) -> Problem:
        """Problem `number` as it lies in the data, whatever the seed."""

    def problem(self, seed: int, index: int) -> Problem:
        epoch, place = divmod(index, self.size)
        return self.row(_order(seed, epoch, self.size)[place])

    def stream(self, seed: int, exclude: frozenset[str]) -> Callable[[int], Problem]:
        """See `Task.stream`. Each problem that is left comes once an epoch; to tell which, all are read here, once."""
        left: Sequence[int] = range(self.size)
        if exclude:
            left = array("Q", (number for number in left if self.row(number).text not in exclude))
        if not left:
            raise dry(self, len(exclude))
        order = lru_cache(maxsize=2)(_order)

        def problem(index: int) -> Problem:
            epoch, place = divmod(index, len(left))
            return self.row(left[order(seed, epoch, len(left))[place]])

        return problem


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, size: int) -> "array[int]":
    """The numbers 0 to `size` - 1, shuffled. [size]"""
    numbers = array("Q", range(size))
    random.Random(stream_seed("epoch", seed, epoch)).shuffle(numbers)
    return numbers
