"""The MTP loss is a sum over tokens whatever the version of megatron-core: packing changes no gradient."""

import pytest

from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import split
from megatron_r1.train.policy import Policy
from tests.checkpoint.conftest import MODEL
from tests.distributed import data


def step(capacity: int) -> tuple[float, float, int]:
    """Norm of the gradient, MTP loss, and how many packs the conversations were put into."""
    initialize(ParallelSection(), seed=0)
    section = ModelSection(path=MODEL, load_weights=False, dtype="float32", init_std=0.1, mtp_loss_coef=1.0)
    policy, loss = Policy(build_model(section, 256), OptimSection(lr=1e-3), 1), CrossEntropy()
    [minibatch] = split(data.chats(0), 1, 0, loss, policy.share(capacity))
    figures = policy.step(minibatch, loss)
    return figures["grad_norm"], figures["mtp_loss"], len(minibatch)


def test_packs_of_any_size_give_the_same_gradient() -> None:
    norm, mtp_loss, packs = step(48)
    other_norm, other_loss, one = step(4096)
    assert packs > one == 1
    assert mtp_loss == pytest.approx(other_loss, rel=1e-6)
    assert norm == pytest.approx(other_norm, rel=1e-5)
