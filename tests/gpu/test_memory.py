"""What a training step takes of the GPU's memory, against `megatron-r1 plan` of the same run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_r1.config.load import validate
from megatron_r1.config.plan import PlanSection
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model.build import build_model
from megatron_r1.plan.plan import plan
from megatron_r1.train.policy import Policy
from tests.gpu.small import LENGTH, minibatch, needs_fused, needs_real_gpu, section

pytestmark = [needs_real_gpu, needs_fused]
BOUND = 0.05
ROWS = 8
SETTINGS = {
    "local": {"kernels": {"layers": "local"}},
    "transformer_engine": {},
    "recomputed": {"memory": {"recompute": "full"}},
    "fp8": {"fp8": {"recipe": "blockwise"}},
}
Record = Callable[[str, object], None]


@pytest.mark.parametrize("name", SETTINGS)
def test_step(v3: Path, name: str, record_property: Record) -> None:
    model = section(v3, **SETTINGS[name])
    config = validate(
        PretrainConfig,
        {
            "output": "unused",
            "tokenizer": "unused",
            "steps": 4,
            "batch": ROWS,
            "microbatch": ROWS,
            "model": model.model_dump(),
            "corpus": {"train": ["unused"], "sequence_length": LENGTH},
            "optim": {"lr": 1e-4},
        },
        where="tests/gpu",
    )
    [expected] = plan("pretrain", config, PlanSection()).memory
    before = torch.cuda.memory_allocated()
    policy = Policy(build_model(model, LENGTH), config.optim, 4)
    for step in range(2):
        policy.step(minibatch(v3, step, ROWS), CrossEntropy())
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    policy.step(minibatch(v3, 2, ROWS), CrossEntropy())
    peak = torch.cuda.max_memory_allocated() - before
    fixed = expected.weights + expected.gradients + expected.optimizer + expected.buffers
    passing = expected.activation_total + expected.recomputed + expected.logits + expected.exchange
    figures = {"held": (held, fixed), "peak": (peak, fixed + passing)}
    record_property(f"bytes measured and planned, {name}", figures)
    assert {key: pair for key, pair in figures.items() if abs(pair[0] / pair[1] - 1) > BOUND} == {}
