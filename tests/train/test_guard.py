"""What is judged bad, by figures worked by hand, and what is done then."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.guard import GuardSection, PretrainGuardSection
from megatron_r1.errors import NumericsError
from megatron_r1.train.batch import Minibatch, from_rows
from megatron_r1.train.guard import BAD_BATCHES, MOST_SAVED, Guard, RewindError, refuse_non_finite

# Median 2, median absolute deviation 0.1: a deviation is 0.14826, six are 0.88956.
LOSSES = [1.9, 2.0, 2.1, 2.2, 1.8, 1.9, 2.0, 2.1]
LIMIT = 2 + 6 * 1.4826 * 0.1
OUT_OF_LINE = [(math.nan, 1.0), (2.0, math.inf), (9.0, 1.0), (2.0, 50.0)]


class Judged:
    """A guard that has seen `LOSSES` with gradient norms around 1, and what it said."""

    def __init__(self, output: Path, **settings: Any) -> None:
        self.said: list[str] = []
        self.guard = Guard(PretrainGuardSection(window=8, **settings), output, 3, self.said.append)
        for loss, norm in zip(LOSSES, [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98], strict=True):
            assert self.step(loss, norm)

    def step(self, loss: float | None, norm: float, step: int = 7) -> bool:
        made = self.guard.judge(loss, norm)
        self.guard.follow_up(step, minibatch(), lambda batch: [torch.ones(micro.selected.numel()) for micro in batch])
        return made


def minibatch() -> Minibatch:
    rows = torch.arange(12).reshape(2, 6)
    return [from_rows(rows, rows + 1, 24), from_rows(rows + 100, rows + 101, 24)]


@pytest.mark.parametrize(("loss", "bad"), [(LIMIT - 1e-6, False), (LIMIT + 1e-6, True), (-9.0, False)])
def test_a_loss_is_bad_above_six_deviations(tmp_path: Path, loss: float, bad: bool) -> None:
    judged = Judged(tmp_path, spike="skip")
    assert judged.step(loss, 1.0) is not bad
    if bad:
        assert judged.said[0].startswith(
            f"step 7: the loss {LIMIT:.6g} is more than 6 deviations above the 2 of the last 8 updates, "
            "so the update was skipped; "
        )


def test_a_gradient_norm_is_compared_by_its_logarithm(tmp_path: Path) -> None:
    logs = np.log([1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98])
    limit = math.exp(np.median(logs) + 6 * 1.4826 * np.median(np.abs(logs - np.median(logs))))
    assert Judged(tmp_path, spike="skip").step(2.0, limit * 0.999)
    assert not Judged(tmp_path, spike="skip").step(2.0, limit * 1.001)
    assert Judged(tmp_path, spike="skip").step(None, 1.0)
    assert not Judged(tmp_path, spike="skip").step(None, limit * 1.001)
    assert Judged(tmp_path, spike="skip").step(2.0, 0.0)


def test_nothing_is_a_spike_before_half_a_window(tmp_path: Path) -> None:
    guard = Guard(GuardSection(spike="skip", window=8), tmp_path, 0, print)
    assert [guard.judge(2.0 + n % 2, 1.0) for n in range(3)] == [True] * 3
    assert guard.judge(1000.0, 1000.0)
    assert not guard.judge(10000.0, 1.0)


def test_a_constant_loss_has_no_spikes_of_rounding(tmp_path: Path) -> None:
    guard = Guard(GuardSection(spike="skip", window=8), tmp_path, 0, print)
    assert all(guard.judge(2.0, 1.0) for _ in range(8))
    assert guard.judge(2.005, 1.005)
    assert not guard.judge(2.1, 1.0)


def test_noise_is_not_taken_for_spikes(tmp_path: Path) -> None:
    """Ten thousand steps of a falling loss, with log-normal gradient norms; then one spike of each kind."""
    rng = random.Random(0)
    guard = Guard(GuardSection(spike="skip"), tmp_path, 0, print)
    steps = [(2 + 8 / (1 + n / 50) + rng.gauss(0, 0.03), rng.lognormvariate(-1, 0.3)) for n in range(10_000)]
    assert sum(not guard.judge(*figures) for figures in steps) <= 2
    assert not guard.judge(2.4, 0.4)
    assert guard.judge(2.05, 0.4)
    assert not guard.judge(2.05, 4.0)


def test_a_spike_in_the_window_does_not_hide_the_next(tmp_path: Path) -> None:
    """It would with mean and standard deviation."""
    judged = Judged(tmp_path, spike="skip")
    assert not judged.step(50.0, 1.0)
    assert not judged.step(4.0, 1.0)


def test_a_lasting_change_becomes_the_new_normal(tmp_path: Path) -> None:
    judged = Judged(tmp_path, spike="warn")
    assert all(judged.step(5.0 + 0.1 * (n % 3), 1.0) for n in range(8))
    assert len(judged.said) == 4  # then 4 of the 8 updates are of the new kind, and the median lies between


@pytest.mark.parametrize(("loss", "norm"), OUT_OF_LINE)
def test_what_each_policy_does(tmp_path: Path, loss: float, norm: float) -> None:
    finite = math.isfinite(loss) and math.isfinite(norm)
    assert not Judged(tmp_path, spike="skip", non_finite="skip").step(loss, norm)
    with pytest.raises(NumericsError, match=r"step 7: .*so the update was refused; the batch is in .*The last check"):
        Judged(tmp_path, spike="stop", non_finite="stop").step(loss, norm)
    if finite:
        assert Judged(tmp_path, spike="off").step(loss, norm)
        assert Judged(tmp_path, spike="warn").step(loss, norm)
        rewound = Judged(tmp_path, spike="rewind")
        with pytest.raises(RewindError) as error:
            rewound.step(loss, norm, step=11)
        assert error.value.step == 11
        assert "so the update was rewound" in rewound.said[0]
    else:
        rewound = Judged(tmp_path, spike="off", non_finite="rewind")
        with pytest.raises(RewindError) as error:
            rewound.step(loss, norm, step=11)
        assert error.value.step == 11
        assert "so the update was rewound" in rewound.said[0]
        with pytest.raises(NumericsError):
            refuse_non_finite(loss, norm)
        with pytest.raises(NumericsError):  # whatever is done about spikes
            Judged(tmp_path, spike="off").step(loss, norm)


def test_good_figures_pass_and_leave_nothing(tmp_path: Path) -> None:
    judged = Judged(tmp_path, spike="rewind")
    assert judged.step(2.0, 1.0)
    assert refuse_non_finite(2.0, 1.0)
    assert (judged.said, list(tmp_path.iterdir())) == ([], [])


def test_too_many_skips_in_a_row_stop_the_run(tmp_path: Path) -> None:
    judged = Judged(tmp_path, non_finite="skip", max_skips=2)
    for _ in range(2):
        assert [judged.step(math.nan, 1.0), judged.step(math.nan, 1.0), judged.step(2.0, 1.0)] == [False, False, True]
    assert [judged.step(2.0, math.nan), judged.step(math.nan, 1.0)] == [False, False]
    with pytest.raises(NumericsError, match="the loss is nan, and max_skips = 2 updates before it were skipped"):
        judged.step(math.nan, 1.0)


def test_the_batch_is_saved_as_it_was_fed(tmp_path: Path) -> None:
    Judged(tmp_path, spike="skip").step(9.0, 1.0, step=12)
    [path] = tmp_path.rglob("*.*")
    assert path == tmp_path / BAD_BATCHES / "step_00000012/rank_3.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["update"] == "skipped"
    assert saved["reason"].startswith("the loss 9 is more than")
    for micro, kept in zip(minibatch(), saved["microbatches"], strict=True):
        assert torch.equal(kept["tokens"], micro.tokens)
        assert torch.equal(kept["labels"], micro.labels)
        assert torch.equal(kept["weights"], micro.inputs.weights)
        assert torch.equal(kept["loss"], torch.ones(12))


def test_a_run_that_only_warns_does_not_fill_the_disk(tmp_path: Path) -> None:
    said: list[str] = []
    guard = Guard(GuardSection(spike="warn", spike_sigma=1e-9), tmp_path, 0, said.append)
    for step in range(2 * MOST_SAVED + 64):
        assert guard.judge(1.1**step, 1.0)
        guard.follow_up(step, minibatch(), lambda _: [])
    assert len(said) == 2 * MOST_SAVED  # none before half a window of 128
    assert len(list((tmp_path / BAD_BATCHES).iterdir())) == MOST_SAVED
    assert "the batch is in" in said[MOST_SAVED - 1]
    assert "the batch is in" not in said[MOST_SAVED]


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.01, 100)), min_size=20, max_size=60), st.integers(0, 19))
def test_a_resumed_run_judges_the_same(figures: list[tuple[float, float]], cut: int) -> None:
    section, nowhere = GuardSection(spike="skip", window=8, max_skips=10**6), Path("/nonexistent")
    undisturbed, killed, resumed = (Guard(section, nowhere, 0, print) for _ in range(3))
    expected = [undisturbed.judge(*pair) for pair in figures]
    judged = [killed.judge(*pair) for pair in figures[:cut]]
    carried = json.loads(json.dumps({"loss_base": 1.5} | killed.state()))
    assert resumed.restore(carried) == {"loss_base": 1.5}
    assert judged + [resumed.judge(*pair) for pair in figures[cut:]] == expected
    assert resumed.state() == undisturbed.state()
