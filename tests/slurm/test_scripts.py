"""The shell scripts, read without running them, and what submit.py makes of run files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm/lib").glob("*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (requirements/slurm.sh)")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_jobs_are_told_before_their_limit_and_requeued(script: Path) -> None:
    options = set(re.findall("^#SBATCH (.*)$", script.read_text(), re.MULTILINE))
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--exclusive"} <= options
    assert f"--job-name={script.stem}" in options


def test_every_variable_is_documented() -> None:
    """Those that a user may set stand at the top of job.sh and in docs/slurm.md."""
    text = (ROOT / "slurm/lib/job.sh").read_text()
    named = re.findall(r"^#   (\w+) ", text, re.MULTILINE)
    assert len(named) >= 8
    page = (ROOT / "docs/slurm.md").read_text()
    assert [name for name in named if f"`{name}`" not in page] == []


def test_layout_of_the_671b(tmp_path: Path) -> None:
    """Options of sbatch, as submit.py works them out for 8 GPUs a node."""
    file = tmp_path / "rl.toml"
    file.write_text(
        'output = "runs/r1"\nsteps = 3\n[model]\npath = "models/v3"\n[data.task]\ntype = "reasoning_gym"\n'
        'dataset = "chain_sum"\n[heldout.task]\ntype = "reasoning_gym"\ndataset = "chain_sum"\n[optim]\nlr = 1e-6\n'
        "[parallel]\nnodes = 32\nprocesses = 8\ntensor = 2\npipeline = 8\nexpert = 32\n[rollout]\nengines = 12\n"
        'max_model_len = 64\nmax_tokens = 32\narguments = ["--tensor-parallel-size=8"]\n'
    )
    command = [sys.executable, ROOT / "slurm/submit.py", "rl", file, "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def lines(*more: str) -> list[str]:
        done = subprocess.run(
            [*command, *more, "--", "--partition=gpu"], env=environment, capture_output=True, text=True, check=True
        )
        return [line for line in done.stderr.splitlines() if line.startswith("sbatch")]

    (one,) = lines()
    own = "--gpus-per-node=8 --exclusive --mem=0 --partition=gpu"
    assert f"--parsable --nodes=32 {own} : --nodes=12 {own} " in one
    assert "/slurm/rl.sbatch " in one
    fleet, learner = lines("--fleet=job")
    assert f"--nodes=12 {own} " in fleet
    assert "/rl_fleet.sbatch " in fleet
    assert f"--nodes=32 {own} " in learner
    assert ":" not in lines("--fleet=local")[0]
