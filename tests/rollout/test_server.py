"""What an engine's arguments say of its GPUs, its processes and the sequences that it is sent."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_r1.config.environment import set_own
from megatron_r1.config.kernels import KernelsSection
from megatron_r1.config.sections import ParallelSection, RolloutSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.parallel import cuda_environment
from megatron_r1.rollout.refill import Refill
from megatron_r1.rollout.server import HEADLESS_MODULE, Server, base_arguments, devices, headless, single_worker
from tests.rollout.test_engine_faults import Open, opened, wait_for  # noqa: F401


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


def test_a_megatron_checkpoint_is_refused(tmp_path: Path) -> None:
    """One of training has a config.json."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    base_arguments(RolloutSection(max_model_len=64, max_tokens=32), tmp_path, "float32", 1)
    (tmp_path / ".metadata").touch()
    with pytest.raises(
        DataError, match=f"{tmp_path} is a Megatron checkpoint.* `megatron-r1 export {tmp_path} FOLDER`"
    ):
        base_arguments(RolloutSection(max_model_len=64, max_tokens=32), tmp_path, "float32", 1)


def test_each_replica_has_sequences_of_its_own(opened: Open) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=4, arguments=["--data-parallel-size=3"])
    assert isinstance(fleet._dispatch, Refill)
    assert fleet._dispatch._capacity == 12


@pytest.fixture
def empty_environment() -> Iterator[None]:
    """None of the variables that a learner may have set; all are as before at the end."""
    with patch.dict(os.environ):
        for name in ("PYTORCH_ALLOC_CONF", *cuda_environment(ParallelSection(tensor=2), KernelsSection())):
            os.environ.pop(name, None)
        yield


def environment_of_a_server(folder: Path, **own: str) -> dict[str, str]:
    """What a process below the supervisor has."""
    file = folder / "environment.json"
    code = f"import json, os, pathlib; pathlib.Path({str(file)!r}).write_text(json.dumps(dict(os.environ)))"
    with closing(Server([sys.executable, "-c", code], own, 0, folder / "log", "none")) as server:
        wait_for(lambda: not server.alive())
    seen: dict[str, str] = json.loads(file.read_text())
    return seen


LEARNERS = cuda_environment(ParallelSection(tensor=2), KernelsSection(cuda_graphs="local"))


@pytest.mark.usefixtures("empty_environment")
def test_what_a_learner_sets_for_itself_stays_with_it(tmp_path: Path) -> None:
    assert len(LEARNERS) == 3
    assert "expandable_segments:True" in LEARNERS.values()
    set_own(LEARNERS)
    assert LEARNERS.items() <= os.environ.items()
    seen = environment_of_a_server(tmp_path, VLLM_NO_USAGE_STATS="1")
    assert not LEARNERS.keys() & seen.keys()
    assert (seen["VLLM_NO_USAGE_STATS"], seen["PATH"]) == ("1", os.environ["PATH"])


@pytest.mark.usefixtures("empty_environment")
def test_what_the_user_has_set_reaches_servers(tmp_path: Path) -> None:
    """Also under another learner, which knows the first one's variables from its own."""
    os.environ |= {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "VLLM_LOGGING_LEVEL": "DEBUG"}
    set_own({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    set_own(LEARNERS | {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    seen = environment_of_a_server(tmp_path)
    assert LEARNERS.keys() & seen.keys() == {"PYTORCH_CUDA_ALLOC_CONF"}
    assert (seen["PYTORCH_CUDA_ALLOC_CONF"], seen["VLLM_LOGGING_LEVEL"]) == ("max_split_size_mb:512", "DEBUG")


def test_the_allocator_is_left_alone_where_the_user_has_named_it_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in cuda_environment(ParallelSection(), KernelsSection())
