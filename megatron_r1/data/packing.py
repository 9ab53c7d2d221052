"""Sequences of unequal length -> packs of at most so many tokens, equally many on every rank."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> int:
    """How many packs of `capacity` tokens best-fit-decreasing needs (DeepSeek-R1, arXiv 2501.12948 v2, B.1).

    A sequence longer than `capacity` has a pack to itself.
    """
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(left, index) for index, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting)[1]] -= length
        else:
            room.append(max(capacity - length, 0))
    return len(room)


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal sequences over data-parallel ranks, longest first to the rank with the least to do.

    Returns each rank's indices, ascending; their numbers differ by at most one.
    """
    quota = -(-len(lengths) // ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < quota), key=lambda r: (loads[r], r))
        hands[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(hand) for hand in hands]


def partition(lengths: Sequence[int], packs: int) -> list[list[int]]:
    """Cut sequences into exactly `packs` packs of near-equal tokens (longest first to the emptiest).

    Packs may be empty when there are fewer sequences than packs.
    """
    bins: list[list[int]] = [[] for _ in range(packs)]
    loads = [0] * packs
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min(range(packs), key=lambda p: (loads[p], p))
        bins[target].append(index)
        loads[target] += lengths[index]
    return [sorted(pack) for pack in bins]
