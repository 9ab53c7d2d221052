"""PPO's step in two processes: every rank holds the values of all samples, and the updates are those of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, ranks: int) -> Any:
    """What the first rank of `rank_program` saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    output = folder / f"{ranks}.json"
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.rank_program", str(folder), str(output)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **world, "RANK": str(rank)}) for rank in range(ranks)
    ]
    assert [process.wait(180) for process in started] == [0] * ranks
    return json.loads(output.read_text())


def flat(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for key in sorted(tree) for number in flat(tree[key])]
    if isinstance(tree, list):
        return [number for part in tree for number in flat(part)]
    return [float(tree)]


@pytest.mark.timeout(400)
def test_two_processes_see_and_learn_what_one_does(make_model: Any, tmp_path: Path) -> None:
    alone, together = run(tmp_path, 1), run(tmp_path, 2)
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together, strict=True):
        assert all(None not in held for held in two["samples"])
        assert one["updates"][0]["value_loss"] > 0.01
        for part in ("figures", "samples", "updates"):
            assert flat(two[part]) == pytest.approx(flat(one[part]), rel=2e-3, abs=2e-4), part
