"""Batch sizes by step, against the ramp walked step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.schedule import BatchRampSection
from megatron_r1.train.batch_ramp import Ramp

V3 = BatchRampSection(start=3072, tokens=469e9, increment=768)


def walked(section: BatchRampSection, batch: int, length: int, steps: int) -> list[tuple[int, int]]:
    """Batch of each step and rows before it: the ramp's tokens in equal parts, the size of the part that is reached."""
    sizes, rows, found = section.sizes(batch), 0, []
    for _ in range(steps):
        part = rows * length * (len(sizes) - 1) // section.tokens
        size = sizes[min(part, len(sizes) - 1)]
        found.append((size, rows))
        rows += size
    return found


@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 5),
    levels=st.integers(1, 6),
    length=st.integers(1, 7),
    tokens=st.integers(1, 600),
)
def test_steps_are_those_of_a_walk(start: int, increment: int, levels: int, length: int, tokens: int) -> None:
    section, batch = BatchRampSection(start=start, tokens=tokens, increment=increment), start + increment * levels
    ramp, expected = Ramp(section, batch, length), walked(section, batch, length, 90)
    assert [(ramp.batch(step), ramp.rows_before(step)) for step in range(90)] == expected
    sizes = [size for size, _ in expected]
    assert sizes == sorted(sizes)
    assert sizes[-1] == batch or expected[-1][1] * length < tokens


@given(start=st.integers(1, 8), levels=st.integers(1, 6), length=st.integers(1, 7), budget=st.integers(1, 5000))
def test_steps_of_a_budget_are_the_fewest(start: int, levels: int, length: int, budget: int) -> None:
    ramp = Ramp(BatchRampSection(start=start, tokens=400), start * (levels + 1), length)
    steps = ramp.steps(budget)
    assert ramp.tokens_before(steps) >= budget > ramp.tokens_before(steps - 1)
    assert ramp.steps(ramp.tokens_before(steps)) == steps


def test_without_a_ramp_every_batch_is_the_same() -> None:
    ramp = Ramp(None, 6, 10)
    assert [(ramp.batch(step), ramp.rows_before(step)) for step in (0, 1, 7)] == [(6, 0), (6, 6), (6, 42)]
    assert [ramp.steps(tokens) for tokens in (60, 61, 600)] == [1, 2, 10]


def test_deepseek_v3() -> None:
    """3072 to 15360 sequences of 4096 tokens in the first 469 B tokens, 14.8 T in all (arXiv 2412.19437, 4.2)."""
    ramp = Ramp(V3, 15360, 4096)
    last = ramp.steps(469_000_000_000)
    assert (ramp.batch(0), ramp.batch(last - 1), ramp.batch(last)) == (3072, 14592, 15360)
    total = ramp.steps(14_800_000_000_000)
    assert 0 <= ramp.tokens_before(total) - 14_800_000_000_000 < 15360 * 4096
    # The 469 B tokens are 16 equal parts, at 3072, 3840, ... 14592 sequences a step.
    steps = sum(469e9 / 16 / 4096 / size for size in range(3072, 15360, 768))
    assert last == pytest.approx(steps, abs=16)
    assert total == pytest.approx(steps + (14.8e12 - 469e9) / 4096 / 15360, abs=17)


def test_another_ramp_is_another_run() -> None:
    others = [
        Ramp(V3, 15360, 2048),
        Ramp(None, 15360, 4096),
        Ramp(BatchRampSection(start=3072, tokens=469e9), 15360, 4096),
    ]
    assert all(other.identity != Ramp(V3, 15360, 4096).identity for other in others)
