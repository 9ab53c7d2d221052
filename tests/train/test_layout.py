"""Rows of packed sequences, filled up as ranks that share them need."""

import torch

from megatron_r1.train.layout import Alignment, lay

TOKENS = [[1, 2, 3], [4, 5, 6, 7, 8]]
LABELS = [[2, 3, 9], [5, 6, 7, 8, 9]]


def test_without_alignment_nothing_is_filled_up() -> None:
    row = lay(TOKENS, LABELS, Alignment())
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert row.labels.tolist() == [[2, 3, 9, 5, 6, 7, 8, 9]]
    assert (row.ends.tolist(), row.stops, row.padding) == ([0, 3, 8], [3, 8], None)
    assert row.ends.dtype is torch.int32


def test_a_row_is_filled_up_by_a_sequence_of_padding() -> None:
    row = lay(TOKENS, LABELS, Alignment(row=3))
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0]]
    assert (row.ends.tolist(), row.stops) == ([0, 3, 8, 9], [3, 8])
    assert row.padding is not None
    assert row.padding.nonzero().tolist() == [[0, 8]]


def test_each_sequence_is_filled_up_where_ranks_cut_it() -> None:
    row = lay(TOKENS, LABELS, Alignment(sequence=4, row=8))
    assert row.tokens.tolist() == [[1, 2, 3, 0, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0]]
    assert (row.ends.tolist(), row.stops) == ([0, 4, 12, 16], [3, 9])
    assert row.padding is not None
    assert (~row.padding).sum() == 8


def test_a_row_without_sequences_is_padding() -> None:
    row = lay([], [], Alignment(sequence=4, row=8))
    assert (row.ends.tolist(), row.stops) == ([0, 8], [])
    assert row.padding is not None
    assert row.padding.all()


def test_a_row_can_be_made_longer() -> None:
    alignment = Alignment(row=2)
    assert alignment.held([3, 5]) == 8
    assert lay(TOKENS, LABELS, alignment, length=12).ends.tolist() == [0, 3, 8, 12]
