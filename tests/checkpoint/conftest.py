"""A small policy that has been trained for a few steps."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.sections import OptimSection, ParallelSection, PolicySection
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import Minibatch, from_rows
from megatron_r1.train.policy import Policy
from megatron_r1.train.reference import Reference

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"
OPTIM = OptimSection(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1)

MakePolicy = Callable[..., Policy]


@pytest.fixture
def make_policy(tmp_path: Path) -> MakePolicy:
    """A policy with random weights; `changes` go into its config.json."""
    return partial(make, tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """One of two layers after one step, because Adam has nothing to save before."""
    policy = make(tmp_path_factory.mktemp("small"), num_hidden_layers=2)
    train(policy, 0, 1)
    return policy


def make(folder: Path, seed: int = 0, optim: OptimSection = OPTIM, updates: int = 10, **changes: object) -> Policy:
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    initialize(ParallelSection(), seed)
    section = PolicySection(
        path=folder, load_weights=False, dtype="float32", init_std=0.05, mtp_loss_coef=0.1, bias_update_rate=1e-3
    )
    return Policy(build_model(section, 64), optim, updates)


def train(policy: Policy, first: int, steps: int) -> list[dict[str, float]]:
    """Steps `first` to `first + steps - 1` on random rows that depend on the step alone."""
    return [policy.step(_rows(step), CrossEntropy()) for step in range(first, first + steps)]


def _rows(step: int) -> Minibatch:
    rows = torch.randint(400, (2, 33), generator=torch.Generator().manual_seed(step))
    return [from_rows(rows[:, :-1], rows[:, 1:], 64)]


@pytest.fixture
def trained(small: Policy, tmp_path: Path) -> tuple[Checkpoints, Policy, Path]:
    """A checkpoint of a training run, with a reference beside the policy."""
    policy = small
    reference = Reference(policy, every=1)
    for tensor in reference.weights[0].values():
        tensor.neg_()  # it is of another step
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointSection(), {"seed": 0})
    checkpoints.save(1, policy.trainable, {"reference": reference.weights}, {})
    return checkpoints, policy, tmp_path / "checkpoints/step_00000001"
