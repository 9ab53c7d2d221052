"""Which rows an optimizer step takes: a function of the seed and the step, so a resumed run needs no cursor."""

import random
from collections.abc import Sequence
from functools import lru_cache

from megatron_r1.seeds import stream_seed


class Epochs:
    """Passes over weighted sources of rows, each in an order of its own, one behind the other.

    Args:
        sources: the rows of each source.
        weights: passes over each source in one epoch.
        epochs: how many.
        batch: rows of a step; only the last step of all may have fewer.
        seed: of the orders.
    """

    def __init__(
        self, sources: Sequence[Sequence[int]], weights: Sequence[float], epochs: int, batch: int, seed: int
    ) -> None:
        self._sources, self._batch, self._seed = sources, batch, seed
        self._counts = [max(1, round(len(rows) * w)) if rows else 0 for rows, w in zip(sources, weights, strict=True)]
        self.rows_per_epoch = sum(self._counts)
        self.rows = epochs * self.rows_per_epoch
        self.steps = -(-self.rows // batch)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> list[int]:
        """The rows of a step."""
        positions = range(step * self._batch, min((step + 1) * self._batch, self.rows))
        return [self._order(n // self.rows_per_epoch)[n % self.rows_per_epoch] for n in positions]

    def _shuffled(self, epoch: int) -> list[int]:
        rng = random.Random(stream_seed("epoch", self._seed, epoch))
        order: list[int] = []
        for rows, count in zip(self._sources, self._counts, strict=True):
            if rows:
                order += list(rows) * (count // len(rows)) + rng.sample(rows, count % len(rows))
        rng.shuffle(order)
        return order
