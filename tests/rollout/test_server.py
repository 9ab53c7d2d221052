"""Which GPUs of the machine an engine sees."""

import pytest

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.server import devices


def section(first_gpu: int | None, *arguments: str) -> RolloutSection:
    return RolloutSection(max_model_len=8, max_tokens=4, engines=2, first_gpu=first_gpu, arguments=list(arguments))


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ([], ["4", "5"]),
        (["--tensor-parallel-size=2"], ["4,5", "6,7"]),
        (["-tp", "2", "--pipeline_parallel_size", "2"], ["4,5,6,7", "8,9,10,11"]),
    ],
)
def test_engines_take_gpus_one_after_another(arguments: list[str], seen: list[str]) -> None:
    assert [devices(section(4, *arguments), index) for index in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": gpus} for gpus in seen
    ]


def test_without_a_first_gpu_they_see_all() -> None:
    assert devices(section(None, "-tp=2"), 0) == {}


def test_a_size_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size=many is no whole number"):
        devices(section(0, "--tensor-parallel-size=many"), 0)
