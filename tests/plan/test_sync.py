"""What the plan says of new weights on their way to the engines."""

from pathlib import Path

import pytest

from megatron_r1.plan.hardware import H100
from tests.plan.test_plan import TINY_RL, planned


def test_bytes_that_nccl_brings_are_those_of_the_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By hand, from the numbers of r1_tiny's config.json; engines are not sent its MTP layer."""
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    plain, eight = (
        planned(capsys, ["--model.dtype=bfloat16", "--rollout.transport=nccl", *more], run_file=small, gpus=1)
        for more in ([], ["--rollout.fp8_path=models/fp8"])
    )
    ends = 2 * 400 * 64
    queries, keys = 64 * 32 + 32 + 32 * 4 * (16 + 16), 64 * (32 + 16) + 32 + 32 * 4 * (16 + 32)
    layer = 2 * 64 + queries + keys + 4 * 32 * 64
    experts = 8 * 64 + 8 + (8 + 1) * 3 * 64 * 32
    weights = ends + 64 + 3 * layer + 3 * 64 * 192 + 2 * experts
    for found, size in ((plain, 2 * weights), (eight, 2 * ends + (1 + 4 / 128**2) * (weights - ends))):
        sync = found["rollout"]["sync"]
        assert sync["bytes"] == size
        assert sync["seconds"] == size / H100.network
        assert "weights for the engines" not in found["host"]
