"""Training in FP8 follows training in BF16.

DeepSeek-V3 (arXiv 2412.19437, appendix B.1) reports less than 0.25 % between the losses of the two.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.sections import OptimSection
from megatron_r1.model.build import build_model
from megatron_r1.train.policy import Policy
from tests.gpu.small import LENGTH, REHEARSAL, losses, needs_fused, section

pytestmark = needs_fused
STEPS = 6 if REHEARSAL else 220
LAST = STEPS // 4
"""Steps over whose mean the curves are compared: a single one's loss is noise."""
REPORTED = 0.0025
SETTINGS = {
    "blockwise": {"recipe": "blockwise"},
    "blockwise, weights too": {"recipe": "blockwise", "parameters": True},
    "current": {"recipe": "current"},
    "delayed": {"recipe": "delayed", "amax_history": 16},
}
OPTIM = OptimSection(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=20)
Record = Callable[[str, object], None]


def curve(v3: Path, **changes: Any) -> list[float]:
    torch.manual_seed(0)
    policy = Policy(build_model(section(v3, **changes), LENGTH), OPTIM, STEPS)
    return losses(policy, v3, STEPS)


@pytest.fixture(scope="module")
def plain(v3: Path) -> list[float]:
    """In BF16."""
    return curve(v3)


def gap(found: list[float], plain: list[float]) -> float:
    """Between the means of the last steps, as a share."""
    return abs(sum(found[-LAST:]) / sum(plain[-LAST:]) - 1)


def test_what_noise_is(v3: Path, plain: list[float], record_property: Record) -> None:
    """Another run in BF16, of plain torch's layers, whose sums are rounded otherwise: FP8 cannot be closer."""
    again = curve(v3, kernels={"layers": "local"})
    record_property("losses, BF16 of other layers", again[:: STEPS // 6])
    record_property(f"gap of the last {LAST} steps, BF16 of other layers", gap(again, plain))
    assert REHEARSAL or again != plain
    assert gap(again, plain) < 10 * REPORTED  # else it is another model


def test_bf16_learns(plain: list[float], record_property: Record) -> None:
    """Else two curves would agree because neither moves. A text has 1.2 nats a token."""
    record_property("losses, BF16", plain[:: STEPS // 6])
    assert plain[-1] < plain[0] - (0 if REHEARSAL else 3)


@pytest.mark.parametrize("name", SETTINGS)
def test_curves_agree(v3: Path, plain: list[float], name: str, record_property: Record) -> None:
    eight = {} if REHEARSAL else {"fp8": SETTINGS[name]}
    found = curve(v3, **eight)
    record_property(f"losses, {name}", found[:: STEPS // 6])
    record_property(f"gap of the last {LAST} steps, {name}", gap(found, plain))
    assert gap(found, plain) <= REPORTED, (found[-LAST:], plain[-LAST:])
