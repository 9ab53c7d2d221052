"""Sequences of unequal length -> packs of at most so many tokens, equally many on every rank."""

from collections.abc import Sequence
from heapq import heapreplace


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal sequences over data-parallel ranks, longest first to the rank with the least to do.

    Returns each rank's indices, ascending; none has more than its share of the count, rounded up.
    """
    quota = -(-len(lengths) // ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < quota), key=lambda r: (loads[r], r))
        hands[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(hand) for hand in hands]


def packs_needed(lengths: Sequence[int], capacity: int) -> int:
    """The fewest packs in which `partition` keeps to `capacity` tokens; a longer sequence has a pack to itself."""
    packs = max(1, min(len(lengths), -(-sum(lengths) // capacity)))
    while packs < len(lengths) and any(
        len(pack) > 1 and sum(lengths[index] for index in pack) > capacity for pack in partition(lengths, packs)
    ):
        packs += 1
    return packs


def partition(lengths: Sequence[int], packs: int) -> list[list[int]]:
    """Cut sequences into exactly `packs` packs of near-equal tokens (longest first to the emptiest).

    Packs may be empty when there are fewer sequences than packs.
    """
    bins: list[list[int]] = [[] for _ in range(packs)]
    loads = [(0, pack) for pack in range(packs)]  # a heap, the emptiest first
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, target = loads[0]
        bins[target].append(index)
        heapreplace(loads, (load + lengths[index], target))
    return [sorted(pack) for pack in bins]
