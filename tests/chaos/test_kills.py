"""Whatever process is killed, whenever: the same command goes on, and ends as if nothing had been.

100 kills and more: `python -m tests.chaos.kills --runs=100`.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.kills import differences
from tests.chaos.victims import MOMENTS, VICTIMS, draw
from tests.end_to_end import runs


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("verb", "kills"), [("pretrain", 8), ("rl", 7)])
def test_every_run_ends_as_the_undisturbed_one(prepared: Path, verb: str, kills: int) -> None:
    options = [f"--verb={verb}", f"--runs={kills}", f"--prepared={prepared}"]
    command = [sys.executable, "-m", "tests.chaos.kills", *options]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["kills"] == kills
    assert summary["finished_runs"] >= 1
    assert set(summary["by_victim"]) == {f"{verb}: {victim}" for victim in VICTIMS[verb]}
    assert set(summary["by_moment"]) == set(MOMENTS)


@pytest.mark.parametrize("verb", VICTIMS)
def test_every_victim_is_hit_at_every_moment(verb: str) -> None:
    count = len(VICTIMS[verb]) * len(MOMENTS)
    kills = draw(verb, count, random.Random(0))
    assert len({(kill.victim, kill.moment) for kill in kills}) == count
    assert {kill.victim for kill in kills[: len(VICTIMS[verb])]} == set(VICTIMS[verb])
    assert draw(verb, count, random.Random(0)) == kills != draw(verb, count, random.Random(1))


def test_a_run_that_differs_is_noticed(prepared: Path, tmp_path: Path) -> None:
    whole = prepared / "base"
    output = shutil.copytree(whole, tmp_path / "run")
    assert differences(output, whole) == []
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = next(line for line in reversed(lines) if '"kind": "step"' in line)
    (output / "metrics.jsonl").write_text("".join(lines) + last)
    assert differences(output, whole) == ["steps"]
    weights = output / "hf/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (output / "samples.jsonl").write_text("{}\n")
    assert differences(output, whole) == ["weights", "steps", "samples"]
