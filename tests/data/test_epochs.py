"""The order of rows: what an epoch holds, and what it depends on."""

from collections import Counter

from megatron_r1.data.epochs import Epochs


def test_every_epoch_holds_every_row_once_and_the_last_step_what_is_left() -> None:
    epochs = Epochs([range(10)], [1.0], epochs=3, batch=4, seed=0)
    assert (epochs.rows_per_epoch, epochs.rows, epochs.steps) == (10, 30, 8)
    batches = [epochs.batch(step) for step in range(8)]
    assert [len(batch) for batch in batches] == [4] * 7 + [2]
    rows = [row for batch in batches for row in batch]
    orders = [rows[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_a_step_depends_on_the_seed_and_its_number_alone() -> None:
    first, again, other = (Epochs([range(50)], [1.0], 2, 8, seed) for seed in (1, 1, 2))
    assert [first.batch(step) for step in range(10)] == [again.batch(step) for step in reversed(range(10))][::-1]
    assert first.batch(0) != other.batch(0)
    assert Epochs([range(50)], [1.0], 5, 8, 1).batch(9) == first.batch(9), "more epochs do not change earlier ones"


def test_weights_are_passes_over_a_source() -> None:
    epochs = Epochs([range(4), range(4, 14), [], range(14, 17)], [2.5, 0.5, 1.0, 1.0], epochs=40, batch=18, seed=0)
    assert epochs.rows_per_epoch == 10 + 5 + 3
    halves = set()
    for step in range(40):
        counts = Counter(epochs.batch(step))
        assert sorted(counts[row] for row in range(4)) == [2, 2, 3, 3]
        half = frozenset(row for row in range(4, 14) if counts[row])
        assert len(half) == 5
        assert all(counts[row] == 1 for row in (*half, 14, 15, 16))
        halves.add(half)
    assert len(halves) > 20
    assert frozenset.union(*halves) == set(range(4, 14))


def test_a_small_weight_still_takes_a_row() -> None:
    assert Epochs([range(3)], [0.01], 1, 8, 0).rows == 1
