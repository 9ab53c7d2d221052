"""What counts as "as accurate as undisturbed"."""

import json
import math
from pathlib import Path

import pytest

from tests.chaos.seed_noise import Accuracies, read

SEEDS = (0.80, 0.82, 0.84)


def accuracies(disturbed: float, base: float = 0.3, answers: int = 1024) -> Accuracies:
    return Accuracies(base, disturbed, SEEDS, answers)


def test_the_expected_is_the_range_of_seeds_and_two_standard_errors() -> None:
    low, high = accuracies(0.8).expected
    assert low == pytest.approx(0.80 - 2 * math.sqrt(0.16 / 1024))
    assert high == pytest.approx(0.84 + 2 * math.sqrt(0.84 * 0.16 / 1024))


@pytest.mark.parametrize("inside", [0.776, 0.82, 0.862])
def test_within_seed_noise(inside: float) -> None:
    assert not accuracies(inside).wrong()


@pytest.mark.parametrize("outside", [0.774, 0.864, 0.3, 1.0])
def test_worse_and_better_than_seed_noise(outside: float) -> None:
    [wrong] = accuracies(outside).wrong()
    assert f"{outside:.1%} is outside" in wrong


def test_more_answers_show_smaller_differences() -> None:
    assert not accuracies(0.78).wrong()
    assert accuracies(0.78, answers=4096).wrong()


@pytest.mark.parametrize("base", [0.76, 0.82])
def test_seeds_that_have_learned_nothing_prove_nothing(base: float) -> None:
    [wrong] = accuracies(0.82, base).wrong()
    assert "no better than the base's" in wrong


def test_accuracies_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    for name, final in {"disturbed": 0.81, "one": 0.80, "other": 0.83}.items():
        (tmp_path / name).mkdir()
        figures = {"heldout_accuracy_base": 0.3, "heldout_accuracy_final": final}
        (tmp_path / name / "summary.json").write_text(json.dumps(figures))
    found = read(tmp_path / "disturbed", [tmp_path / "one", tmp_path / "other"], 1024)
    assert found == Accuracies(0.3, 0.81, [0.80, 0.83], 1024)
