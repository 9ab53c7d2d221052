"""How far engine and learner are apart, over all tokens and over those that both should agree about."""

import math

import pytest
import torch

from megatron_r1.config.asynchrony import CorrectionSection
from megatron_r1.config.sections import ParallelSection
from megatron_r1.loss.base import LossInputs
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import MicroBatch
from megatron_r1.train.correction import agreement, corrected

RATIOS = {4: [1.0, 3.0], 0: [0.5], 7: [1.25, 0.8, 1.0]}
"""pi_learner / pi_engine of each token of three samples, by their numbers."""


def micro(*samples: int) -> MicroBatch:
    ratios = [ratio for sample in samples for ratio in RATIOS[sample]]
    counts = torch.tensor([len(RATIOS[sample]) for sample in samples])
    empty = torch.zeros(1, len(ratios), dtype=torch.long)
    engine = torch.full((len(ratios),), -2.0)
    inputs = LossInputs(
        weights=torch.ones(len(ratios)),
        segments=torch.arange(len(samples)).repeat_interleave(counts),
        old_logprobs=engine + torch.tensor(ratios).log(),
    )
    return MicroBatch(empty, empty, None, torch.arange(len(ratios)), inputs, engine, list(samples))


@pytest.fixture
def batch() -> list[list[MicroBatch]]:
    initialize(ParallelSection(), seed=1)
    return [[micro(4, 0)], [micro(7)]]


def test_weights_and_what_they_are_like(batch: list[list[MicroBatch]]) -> None:
    weighted, figures = corrected(batch, CorrectionSection(kind="token", cap=2.0))
    first, second = (minibatch[0].inputs.importance for minibatch in weighted)
    assert first is not None
    assert second is not None
    assert first.tolist() == pytest.approx([1, 2, 0.5])
    assert second.tolist() == pytest.approx([1.25, 0.8, 1])
    ratios = [ratio for values in RATIOS.values() for ratio in values]
    divergences = [ratio - 1 - math.log(ratio) for ratio in ratios]
    assert figures["importance_ratio"] == pytest.approx(sum(ratios) / 6)
    assert figures["importance_changed"] == pytest.approx(1 / 6)
    assert figures["mismatch_kl"] == pytest.approx(sum(divergences) / 6, rel=1e-5)
    assert figures["mismatch_kl_kept"] == pytest.approx((sum(divergences) - (2 - math.log(3))) / 5, rel=1e-4)


def test_where_every_token_is_out_of_bounds_none_is_kept(batch: list[list[MicroBatch]]) -> None:
    section = CorrectionSection(kind="token", outside="drop", floor=10.0, cap=20.0)
    _, figures = corrected(batch, section)
    assert figures["importance_changed"] == 1
    assert figures["mismatch_kl"] > 0
    assert "mismatch_kl_kept" not in figures


def test_without_correction_there_are_figures_and_no_weights(batch: list[list[MicroBatch]]) -> None:
    weighted, figures = corrected(batch, CorrectionSection())
    assert all(one.inputs.importance is None for minibatch in weighted for one in minibatch)
    assert figures["importance_changed"] == 0
    assert figures["mismatch_kl"] == figures["mismatch_kl_kept"] > 0


def test_only_samples_of_the_learners_own_weights_have_to_agree(batch: list[list[MicroBatch]]) -> None:
    versions = [3] * 8
    everything = agreement(batch, versions, version=3)
    assert everything["logprob_difference_max"] == pytest.approx(math.log(3))
    versions[4] = 2
    found = agreement(batch, versions, version=3)
    assert found["logprob_difference_max"] == pytest.approx(math.log(2))
    assert found["logprob_difference_mean"] == pytest.approx((math.log(2) + 2 * math.log(1.25)) / 4, rel=1e-5)
    assert agreement(batch, versions, version=4) == {}
