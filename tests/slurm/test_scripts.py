"""The shell scripts, read without running them, and what submit.py makes of run files."""

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A run file of the size of the 671B."""
    file = tmp_path / "rl.toml"
    file.write_text(
        'output = "runs/r1"\nsteps = 3\n[model]\npath = "models/v3"\n[data.task]\ntype = "reasoning_gym"\n'
        'dataset = "chain_sum"\n[heldout.task]\ntype = "reasoning_gym"\ndataset = "chain_sum"\n[optim]\nlr = 1e-6\n'
        "[parallel]\nnodes = 32\nprocesses = 8\ntensor = 2\npipeline = 8\nexpert = 32\n[rollout]\nengines = 12\n"
        'max_model_len = 64\nmax_tokens = 32\narguments = ["--tensor-parallel-size=8"]\n'
    )
    return file


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """What submit.py would submit, with its own words where it refuses to."""
    main = runpy.run_path(str(ROOT / "slurm/submit.py"))["main"]

    def submitted(*arguments: str | Path) -> list[str]:
        command = ["submit.py", *map(str, arguments), "--dry-run", "--", "--partition=gpu"]
        monkeypatch.setattr(sys, "argv", command)
        main()
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("sbatch")]

    return submitted


def test_layout_of_the_671b(large: Path, lines: Callable[..., list[str]]) -> None:
    """Options of sbatch, as submit.py works them out for 8 GPUs a node; a script's own are of its first part alone."""
    (one,) = lines("rl", large)
    own = "--gpus-per-node=8 --exclusive --mem=0 --requeue --partition=gpu"
    assert f"--parsable --nodes=32 {own} : --nodes=12 {own} " in one
    assert "/slurm/rl.sbatch " in one
    fleet, learner = lines("rl", large, "--fleet=job")
    assert f"--nodes=12 {own} " in fleet
    assert "/rl_fleet.sbatch " in fleet
    assert f"--nodes=32 {own} " in learner
    assert ":" not in lines("rl", large, "--fleet=local")[0]


def test_nothing_is_submitted_that_does_not_go_with_engines_elsewhere(
    large: Path, tmp_path: Path, lines: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second stage of the recipe cannot be, so the first is not submitted either."""
    asleep, refused = "--rollout.sleep=true", r"^submit\.py: rollout: sleep gives a GPU's memory back to the trainer"
    for more in ([], ["--fleet=job"]):
        with pytest.raises(SystemExit, match=refused):
            lines("rl", large, asleep, *more)
        assert "sbatch" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"first_gpu is for engines .* --fleet=local"):
        lines("rl", large, "--rollout.first_gpu=4")
    assert len(lines("rl", large, asleep, "--fleet=local")) == 1
    settings = large.read_text().partition("\n")[2].replace("\n[", "\n[stages.r1.").replace("[stages.r1.[", "[")
    first = '[stages.corpus]\nverb = "data generate"\ntask = {type = "reasoning_gym", dataset = "chain_sum"}\n'
    first += "documents = 10\nquality = {careful = 1.0}\n"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'output = "runs/all"\n{first}[stages.r1]\nverb = "rl"\n{settings}')
    assert len(lines(recipe)) == 2
    with pytest.raises(SystemExit, match=refused):
        lines(recipe, "--stages.r1.rollout.sleep=true")
    assert "sbatch" not in capsys.readouterr().err
