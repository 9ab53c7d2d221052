"""Preference pairs whose lengths say nothing about which response was chosen."""

from collections.abc import Sequence
from statistics import fmean


def balanced(lengths: Sequence[tuple[int, int]], tolerance: float) -> list[int]:
    """Numbers of the pairs to keep, in order, so that |mean chosen - mean rejected| <= tolerance * their mean.

    As few as possible are left out: each time the pair that does most for the side that is longer on average.

    Args:
        lengths: of the chosen and of the rejected response of each pair.
        tolerance: a share.
    """
    chosen, rejected = sum(pair[0] for pair in lengths), sum(pair[1] for pair in lengths)
    side = 1 if chosen >= rejected else -1
    order = sorted(range(len(lengths)), key=lambda number: side * (lengths[number][0] - lengths[number][1]))
    while order and side * (chosen - rejected) > tolerance * (chosen + rejected) / 2:
        longest = order.pop()
        chosen, rejected = chosen - lengths[longest][0], rejected - lengths[longest][1]
    return sorted(order)


def means(lengths: Sequence[tuple[int, int]]) -> dict[str, float | None]:
    """The mean length of the chosen and of the rejected."""
    if not lengths:
        return {"chosen": None, "rejected": None}
    return {"chosen": fmean(pair[0] for pair in lengths), "rejected": fmean(pair[1] for pair in lengths)}
