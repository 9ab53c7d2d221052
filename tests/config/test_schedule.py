"""Settings by tokens and by steps: what a run file may say, and what it gets."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.load import dump, load
from megatron_r1.config.schedule import (
    BatchRampSection,
    Phases,
    Piece,
    Piecewise,
    Stepwise,
    largest,
    shares,
    value_at,
    value_at_step,
)
from megatron_r1.config.section import Section
from megatron_r1.errors import ConfigError


class Run(Section):
    """A run file with all of them."""

    weight: Piecewise = 0.3
    length: Stepwise = 8
    phases: Phases = []
    batch_ramp: BatchRampSection | None = None


def read(tmp_path: Path, text: str) -> Run:
    (tmp_path / "run.toml").write_text(text)
    return load(tmp_path / "run.toml", [], Run)


def test_a_number_holds_always(tmp_path: Path) -> None:
    config = read(tmp_path, "weight = 0.25")
    assert [value_at(config.weight, tokens) for tokens in (0, 10**15)] == [0.25, 0.25]
    assert largest(config.weight) == 0.25


def test_values_hold_until_their_tokens_are_consumed(tmp_path: Path) -> None:
    """DeepSeek-V3, 4.2: the MTP weight is 0.3 for the first 10 T tokens."""
    config = read(tmp_path, "weight = [{ value = 0.3, until_tokens = 10e12 }, { value = 0.1 }]")
    found = [value_at(config.weight, tokens) for tokens in (0, 10**13 - 1, 10**13, 10**16)]
    assert found == [0.3, 0.3, 0.1, 0.1]
    assert largest(config.weight) == 0.3


def test_whole_numbers_hold_until_their_step(tmp_path: Path) -> None:
    """DeepSeek-R1-Zero: 65,536 tokens from update 8.2 K on, which are 512 rollouts of 16."""
    config = read(tmp_path, "length = [{ value = 32768, until_step = 512 }, { value = 65536 }]")
    assert [value_at_step(config.length, step) for step in (0, 511, 512, 10**6)] == [32768, 32768, 65536, 65536]
    assert largest(config.length) == 65536
    assert shares(config.length, 650) == {32768: 512 / 650, 65536: 138 / 650}
    assert shares(config.length, 100) == {32768: 1.0}, "a shorter run"
    assert load_again(tmp_path, config) == config
    plain = read(tmp_path, "length = 7")
    assert (value_at_step(plain.length, 10**6), largest(plain.length), shares(plain.length, 5)) == (7, 7, {7: 1.0})


def test_tokens_are_whole_however_written(tmp_path: Path) -> None:
    config = read(tmp_path, "weight = [{ value = 1, until_tokens = 14.3e12 }, { value = 0 }]")
    assert isinstance(config.weight, list)
    assert config.weight[0].until_tokens == 14_300_000_000_000
    assert load_again(tmp_path, config) == config


def load_again(tmp_path: Path, config: Run) -> Run:
    return read(tmp_path, dump(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight = -0.1", "greater than or equal to 0"),
        ('weight = "much"', "valid number"),
        ("weight = []", "at least 1"),
        ("weight = [{ value = 1 }, { value = 2 }]", "only the last value"),
        ("weight = [{ value = 1, until_tokens = 5 }]", "nothing follows"),
        ("weight = [{ value = 1, until_tokens = 1.5 }, { value = 2 }]", "valid integer"),
        ("weight = [{ value = 1, untl_tokens = 5 }, { value = 2 }]", "untl_tokens"),
        (
            "weight = [{ value = 1, until_tokens = 9 }, { value = 1, until_tokens = 9 }, { value = 2 }]",
            "has to grow: 9 follows 9",
        ),
        ("length = 0", "greater than 0"),
        ("length = []", "at least 1"),
        ("length = [{ value = 1.5, until_step = 5 }, { value = 2 }]", "valid integer"),
        ("length = [{ value = 1, until_step = 5 }]", "the last value has `until_step`"),
        ("length = [{ value = 1, until_step = 5 }, { value = 2, until_step = 5 }, { value = 3 }]", "5 follows 5"),
        ("length = [{ value = 1, until_tokens = 5 }, { value = 2 }]", "until_tokens"),
        ("phases = [{ lr = 1e-4 }, { lr = 1e-5 }]", "phase 1 never ends"),
        ("phases = [{ until_step = 5 }, { until_tokens = 100 }]", "in all of them"),
        ("phases = [{ until_step = 5, until_tokens = 100 }]", "in all of them"),
        ("phases = [{ until_step = 5 }, { schedule = 'cosine', until_step = 9 }]", "phase 2 is 'cosine'"),
        ("phases = [{ until_step = 5 }, { schedule = 'linear', lr = 0 }]", "phase 2 is 'linear'"),
        ("phases = [{ until_step = 5 }, { until_step = 3 }]", "`until_step` counts from the start"),
    ],
)
def test_mistakes_are_named_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    assert message in str(refused.value)
    assert ";" not in str(refused.value)


@pytest.mark.parametrize(("start", "increment", "batch"), [(8, 3, 16), (16, None, 16), (32, None, 16), (6, None, 16)])
def test_a_ramp_that_misses_the_batch_is_refused(start: int, increment: int | None, batch: int) -> None:
    with pytest.raises(ValueError, match=f"does not reach batch {batch}"):
        BatchRampSection(start=start, increment=increment, tokens=100).sizes(batch)


@given(st.lists(st.integers(1, 10**15), min_size=1, max_size=5, unique=True), st.integers(0, 10**15))
def test_a_value_is_that_of_the_first_end_not_yet_reached(ends: list[int], tokens: int) -> None:
    pieces: list[Any] = [Piece(value=i, until_tokens=end) for i, end in enumerate(sorted(ends))]
    assert value_at([*pieces, Piece(value=len(ends))], tokens) == sum(end <= tokens for end in ends)
