"""What an engine's arguments say of its GPUs, its processes and the sequences that it is sent."""

from pathlib import Path

import pytest

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.refill import Refill
from megatron_r1.rollout.server import HEADLESS_MODULE, base_arguments, devices, headless, single_worker
from tests.rollout.test_engine_faults import Open, opened  # noqa: F401


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


@pytest.mark.parametrize("size", ["-tp=2", "--pipeline-parallel-size=2", "-dp=2", "--data-parallel-size=2"])
def test_more_than_one_rank_needs_more_than_one_worker(size: str) -> None:
    assert not single_worker(section(None, size))
    assert single_worker(section(None, "--max-num-batched-tokens=64"))


def test_a_part_without_a_listener_has_the_same_arguments(tmp_path: Path) -> None:
    command = base_arguments(section(None), tmp_path, "float32", 8700)
    assert headless(command) == [command[0], "-m", HEADLESS_MODULE, *command[3:], "--headless"]


def test_each_replica_has_sequences_of_its_own(opened: Open) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=4, arguments=["--data-parallel-size=3"])
    assert isinstance(fleet._dispatch, Refill)
    assert fleet._dispatch._capacity == 12
