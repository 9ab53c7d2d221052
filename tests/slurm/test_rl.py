"""Reinforcement learning as jobs: trainer and engines on different nodes, and all that can befall them."""

import stat
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import runs
from tests.slurm.cluster import Slurm, until
from tests.slurm.jobs import submit

PORT = 9600
pytestmark = pytest.mark.timeout(1800)


def run_file(prepared: Path, output: Path) -> Path:
    """4 steps, a checkpoint after each, two engines that are sent shares of a batch: the same seed, the same bits."""
    tree: dict[str, Any] = runs.rl(prepared, output, PORT)
    tree |= {"steps": 4, "loss": {"type": "grpo", "kl_coef": 0.05}}
    tree["rollout"] |= {"engines": 2, "start_timeout": 900.0}
    tree["evaluation"] |= {"every": 4}
    return runs.write(output.with_suffix(".toml"), tree)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the run by itself, with engines of its own."""
    output = tmp_path_factory.mktemp("undisturbed") / "rl"
    with runs.Command("rl", run_file(prepared, output)) as command:
        assert command.end(900) == 0, command.message()
    return output


def assert_equal(output: Path, undisturbed: Path) -> None:
    assert runs.rows(output) == runs.rows(undisturbed)
    assert runs.weights(output) == runs.weights(undisturbed)


def test_one_job_of_two_parts(slurm: Slurm, prepared: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Asked to end before its limit, it saves and goes on; when a node dies, it goes on with another one."""
    output = tmp_path / "rl"
    (job,) = submit(slurm, tmp_path, "rl", str(run_file(prepared, output)), HEALTH_CHECK="0")
    job.until(runs.checkpoint(output, 1))
    fleet = job.nodes(part=1)
    assert len({*job.nodes(), *fleet}) == 3
    slurm.call("scancel", "--signal=USR1", "--batch", job.number)
    job.until(lambda: job.attempts() == ["75"])
    job.until(runs.checkpoint(output, 2), told="the second attempt")
    dead = job.nodes(part=1)[-1]
    slurm.kill_node(dead)
    job.end()
    assert dead not in job.nodes(part=1)
    assert job.attempts()[0] == "75"
    assert_equal(output, undisturbed)
    assert "report: " in job.said()
    slurm.start_node(dead)
    until(lambda: slurm.states()[dead] == "idle", 60)


def test_two_jobs_find_each_other(slurm: Slurm, prepared: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The token is in a file that nobody else can read, and on no command line."""
    output = tmp_path / "rl"
    file = str(run_file(prepared, output))
    fleet, job = submit(slurm, tmp_path, "rl", file, "--fleet=job", HEALTH_CHECK="0")
    job.until(runs.checkpoint(output, 1))
    jobs = output / "logs/slurm"
    assert stat.S_IMODE((jobs / "token").stat().st_mode) == 0o600
    token = (jobs / "token").read_text()
    assert not [line for process in slurm.processes() for line in process.cmdline() if token in line]
    job.end()
    assert_equal(output, undisturbed)
    until(lambda: not slurm.call("squeue", "--noheader", "--jobs", fleet.number, check=False), 60)
    assert not (jobs / "fleet").exists()
