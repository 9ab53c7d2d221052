from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.tasks.shares import BLOCK, Shares
from megatron_r1.errors import ConfigError

WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9)


@settings(max_examples=30)
@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_every_block_has_the_shares(weights: list[float], seed: int, block: int) -> None:
    named = {f"part {number}": weight for number, weight in enumerate(weights)}
    shares = Shares(named)
    places = [shares.place(seed, block * BLOCK + place) for place in range(BLOCK)]
    counts = Counter(name for name, _ in places)
    for name, weight in named.items():
        assert abs(counts[name] - BLOCK * weight / sum(weights)) < 1
        numbers = [number for part, number in places if part == name]
        assert numbers == list(range(block * counts[name], (block + 1) * counts[name]))


def test_round_shares_are_exact_and_remainders_go_to_the_largest() -> None:
    def counts(**weights: float) -> Counter[str]:
        return Counter(Shares(weights).place(0, index)[0] for index in range(BLOCK))

    assert counts(a=7, b=2, c=1) == {"a": 700, "b": 200, "c": 100}
    assert counts(a=1, b=1, c=1) == {"a": 334, "b": 333, "c": 333}
    assert counts(a=0.5004, b=0.4996) == {"a": 500, "b": 500}
    assert counts(a=0.5006, b=0.4994) == {"a": 501, "b": 499}


def test_parts_are_mixed_within_a_block_and_differently_in_each() -> None:
    shares = Shares({"a": 1, "b": 1})
    order = "".join(shares.place(5, index)[0] for index in range(4 * BLOCK))
    blocks = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]
    assert len(set(blocks)) == 4
    assert order[:BLOCK] != "".join(shares.place(6, index)[0] for index in range(BLOCK))
    for start in range(0, len(order), 100):
        assert 20 < order[start : start + 100].count("a") < 80


def test_a_part_that_would_never_come() -> None:
    with pytest.raises(ConfigError, match="'b' with weight 1 of 10001 comes to less than one question in 1000"):
        Shares({"a": 10000, "b": 1})
