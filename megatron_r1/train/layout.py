"""Sequences laid one behind the other in one row, filled up where the ranks that share the row need it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Alignment:
    """What the lengths in a row divide by. Ranks that share a row hold equal parts of it."""

    sequence: int = 1
    """Of each sequence: context-parallel ranks cut each."""
    row: int = 1
    """Of the whole row, a multiple of `sequence`."""

    def held(self, lengths: Sequence[int]) -> int:
        """Positions of a row of sequences of these lengths."""
        return max(_up(sum(_up(length, self.sequence) for length in lengths), self.row), self.row)


@dataclass(frozen=True)
class Row:
    """One row of packed sequences."""

    tokens: torch.Tensor
    """[1, seq]"""
    labels: torch.Tensor
    """[1, seq]"""
    ends: torch.Tensor
    """Where each sequence ends, with what it is filled up with, 0 first. int32 [sequences + 1]"""
    stops: list[int]
    """Where the tokens of each sequence end. [sequences]"""
    padding: torch.Tensor | None
    """True where nothing stands; None = nowhere. [1, seq]"""


def lay(tokens: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], alignment: Alignment, length: int = 0) -> Row:
    """Put sequences into one row.

    A row without any has padding alone. Behind the last sequence stands one of padding where the row needs it.

    Args:
        tokens: [sequences][length]
        labels: the same of what is predicted at each.
        alignment: of the lengths.
        length: of the row, if more than it needs.
    """
    lengths = [len(part) for part in tokens]
    held = [_up(length, alignment.sequence) for length in lengths]
    total = max(alignment.held(lengths), length)
    if rest := total - sum(held):
        lengths, held = [*lengths, 0], [*held, rest]
    ends = torch.tensor([0, *held]).cumsum(0)
    stops = [start + length for start, length in zip(ends.tolist(), lengths, strict=False)]
    row = torch.zeros(2, 1, total, dtype=torch.long)
    padding = torch.ones(1, total, dtype=torch.bool)
    for start, stop, *parts in zip(ends.tolist(), stops, tokens, labels, strict=False):
        row[:, 0, start:stop] = torch.tensor(parts)
        padding[0, start:stop] = False
    return Row(row[0], row[1], ends.to(torch.int32), stops[: len(tokens)], padding if padding.any() else None)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
