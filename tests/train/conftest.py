"""A small policy and a rollout to train it on."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import OptimSection, ParallelSection, PolicySection
from megatron_r1.loss.grpo import Grpo
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import Minibatch, Share, Trajectory, attach, split
from megatron_r1.train.policy import Policy

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"
OPTIM = OptimSection(lr=1e-2, weight_decay=0.0)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[], BuiltModel]:
    """The same model (same seed, same weights) at every call; without the MTP layer, which RL leaves out."""
    config = json.loads((MODEL / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def make() -> BuiltModel:
        initialize(ParallelSection(), seed=7)
        return build_model(PolicySection(path=tmp_path, load_weights=False, dtype="float32", init_std=0.08), 128)

    return make


@pytest.fixture
def make_policy(make_model: Callable[[], BuiltModel]) -> Callable[..., Policy]:
    """The same policy at every call."""

    def make(temperature: float = 1.0, optim: OptimSection = OPTIM) -> Policy:
        return Policy(make_model(), optim, updates=10, temperature=temperature)

    return make


def rollout(samples: int = 24, seed: int = 0) -> list[Trajectory]:
    """Random prompts and responses of unequal length."""
    rng = random.Random(seed)
    made = []
    for _ in range(samples):
        prompt, response = rng.randint(3, 12), rng.randint(1, 30)
        tokens = [rng.randrange(400) for _ in range(prompt + response)]
        made.append(Trajectory(tokens, response, [-1.0] * response))
    return made


def one_minibatch(samples: list[Trajectory], loss: Grpo, capacity: int = 10_000) -> Minibatch:
    """The whole rollout as one minibatch of packs of `capacity` tokens, with random advantages."""
    share = Share(rank=0, ranks=1, capacity=capacity, device=torch.device("cpu"))
    return attach(next(split(samples, 1, 0, loss, share)), advantages=advantages(samples))


def advantages(samples: list[Trajectory], seed: int = 0) -> list[list[float]]:
    """An advantage of its own for every sample of a rollout."""
    rng = random.Random(seed)
    return [[rng.gauss(0, 1)] * sample.response_length for sample in samples]
