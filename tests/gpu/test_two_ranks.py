"""Tensor, expert and pipeline parallelism over NCCL, both ranks on one GPU, against one process.

NCCL refuses two ranks on one GPU before 2.30. `MEGATRON_R1_NCCL` names a `libnccl.so.2` that is loaded instead of
torch's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS, ROOT, Seen, differences
from tests.gpu.small import ON_GPU, needs_gpu
from tests.rollout.tiny_model import free_port

BOUND = 1e-4
"""Largest relative difference. The sums of float32 products have another order than a CPU's, and atomic additions."""
OLDEST = (2, 30)
SECONDS = 240


def environment() -> dict[str, str]:
    """Few multiprocessors for each rank, so that the kernels of both find room to wait for one another."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if library := os.environ.get("MEGATRON_R1_NCCL"):
        found["LD_PRELOAD"] = library
    return found | {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}


def _refusal() -> str:
    """Why NCCL cannot do it here."""
    if not ON_GPU:
        return ""
    code = "import torch; from megatron_r1.doctor import nccl; print(*nccl.version())"
    asked = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    found = tuple(map(int, asked.stdout.split()))
    return f"NCCL {found} refuses two ranks on one GPU; MEGATRON_R1_NCCL names another" if found < OLDEST else ""


@pytest.fixture(scope="module")
def able() -> None:
    if why := _refusal():
        pytest.skip(why)


pytestmark = [needs_gpu, pytest.mark.usefixtures("able")]


def trained(folder: Path, models: Path, parallel: dict[str, Any], ranks: int) -> Seen:
    """Five updates on packed conversations by so many processes."""
    port, processes = str(free_port()), []
    folder.mkdir()
    command = [sys.executable, "-m", "tests.gpu.rank_program", str(folder), str(models / "v3"), json.dumps(parallel)]
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "MASTER_PORT": port, "MASTER_ADDR": "localhost"}
        log = (folder / f"rank_{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment() | {name: str(value) for name, value in place.items()},
                stdout=log, stderr=log,
            )
        )  # fmt: skip
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
    return Seen.read(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of `tests/distributed/models.py`, written on the CPU."""
    root = tmp_path_factory.mktemp("ranks") / "models"
    code = "import sys, pathlib; from tests.distributed import models; models.write_all(pathlib.Path(sys.argv[1]))"
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code, str(root)], cwd=ROOT, env=hidden, check=True)
    return root


@pytest.fixture(scope="module")
def alone(models: Path) -> Seen:
    return trained(models.parent / "alone", models, {}, 1)


@pytest.mark.parametrize("name", ["tp2", "ep2", "pp2"])
def test_layout(alone: Seen, models: Path, tmp_path: Path, name: str) -> None:
    worst = differences(trained(tmp_path / name, models, LAYOUTS[name], 2), alone)
    assert {column: value for column, value in worst.items() if value > BOUND} == {}
