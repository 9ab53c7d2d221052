"""Packing and dealing: nothing lost, capacity kept, loads even."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.data.packing import deal, packs_needed, partition

LENGTHS = st.lists(st.integers(1, 80), min_size=1, max_size=40)


@given(LENGTHS, st.integers(20, 120))
def test_packs_keep_to_capacity_unless_one_sequence_is_longer(lengths: list[int], capacity: int) -> None:
    packs = partition(lengths, packs_needed(lengths, capacity))
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity or len(pack) == 1 for pack in packs)


def test_no_more_packs_than_needed() -> None:
    assert packs_needed([50, 50, 50, 50], 100) == 2
    assert packs_needed([60, 60, 40, 40], 100) == 2
    assert packs_needed([60, 60, 60], 100) == 3
    assert packs_needed([500], 100) == 1
    assert packs_needed([], 100) == 1


@given(LENGTHS, st.integers(1, 6))
def test_every_sequence_is_dealt_once_and_no_hand_is_over_its_share(lengths: list[int], ranks: int) -> None:
    hands = deal(lengths, ranks)
    assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
    assert all(len(hand) <= -(-len(lengths) // ranks) for hand in hands)


def test_long_sequences_go_to_different_ranks() -> None:
    hands = deal([100, 1, 100, 1], 2)
    assert [sum([100, 1, 100, 1][i] for i in hand) for hand in hands] == [101, 101]
