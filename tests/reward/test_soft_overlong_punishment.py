import pytest

from megatron_r1.errors import ConfigError
from tests.reward.shape_samples import sample, score


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_dapo_equation_13(tokens: int, expected: float) -> None:
    [value] = score("soft_overlong_punishment", sample("", tokens), max_length=100, cache=20)
    assert value == pytest.approx(expected)


def test_open_r1_defaults() -> None:
    samples = [sample("", tokens) for tokens in (12288, 14336, 16384, 16385)]
    assert score("soft_overlong_punishment", *samples) == [0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("cache", [100, 101, 0])
def test_a_cache_that_leaves_no_room(cache: int) -> None:
    with pytest.raises(ConfigError, match="cache"):
        score("soft_overlong_punishment", max_length=100, cache=cache)
