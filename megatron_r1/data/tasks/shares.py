"""Which part of a mixture each position belongs to: exact shares, and no cursor to save."""

import random
from array import array
from collections.abc import Mapping
from functools import lru_cache

from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed

BLOCK = 1000
"""Positions within which every share is exact."""


class Shares:
    """Positions dealt to parts by weight.

    In each block of `BLOCK` positions a part has the same number of them: its share, rounded by largest remainder. The
    order within a block is shuffled.

    Raises:
        ConfigError: a part is so light that it has no position at all.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._names = list(weights)
        self._quotas = _quotas(list(weights.values()))
        for name, quota in zip(self._names, self._quotas, strict=True):
            if not quota:
                raise ConfigError(
                    f"{name!r} with weight {weights[name]:g} of {sum(weights.values()):g} comes to less than "
                    f"one question in {BLOCK}: raise its weight or leave it out"
                )
        self._block = lru_cache(maxsize=4)(self._dealt)

    def place(self, seed: int, index: int) -> tuple[str, int]:
        """The part that position `index` belongs to, and how many positions that part has had before."""
        block, place = divmod(index, BLOCK)
        parts, before = self._block(seed, block)
        part = parts[place]
        return self._names[part], block * self._quotas[part] + before[place]

    def _dealt(self, seed: int, block: int) -> tuple["array[int]", "array[int]"]:
        """For each position of a block its part, and how often that part came before within the block."""
        parts = array("H", [part for part, quota in enumerate(self._quotas) for _ in range(quota)])
        random.Random(stream_seed("shares", seed, block)).shuffle(parts)
        before, counts = array("H"), [0] * len(self._quotas)
        for part in parts:
            before.append(counts[part])
            counts[part] += 1
        return parts, before


def _quotas(weights: list[float]) -> list[int]:
    """`BLOCK` divided in proportion to `weights`, by largest remainder; the first of equals gains."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda part: quotas[part] - exact[part])
    for part in by_remainder[: BLOCK - sum(quotas)]:
        quotas[part] += 1
    return quotas
