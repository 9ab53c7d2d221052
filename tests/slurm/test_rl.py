"""Reinforcement learning as jobs: trainer and engines on different nodes, and all that can befall them."""

import json
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end import runs
from tests.processes import command_line
from tests.slurm.cluster import Slurm, until
from tests.slurm.jobs import submit

PORT = 9600
BOUND = 1e-4
"""Of the mean difference between log-probabilities of engine and trainer, in nats."""
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
    until(lambda: slurm.states()[dead] == "idle", 180)


def test_two_jobs_with_an_engine_on_two_nodes(slurm: Slurm, prepared: Path, tmp_path: Path) -> None:
    """They find each other, with a token in a file that nobody else can read, and on no command line.

    The engine's log-probabilities are the trainer's at every step. What keeps its second part is killed between two
    steps, and is replaced; the engine begins anew as a whole, and gets its weights again.
    """
    output, hold = tmp_path / "rl", tmp_path / "hold"
    hold.touch()
    tree = runs.rl(prepared, output, PORT) | {"steps": 2, "logprob_bound": BOUND}
    tree["loss"] = {"type": "tests.end_to_end.components:Held", "file": str(hold), "kl_coef": 0.05}
    tree["rollout"] |= {"arguments": ["--tensor-parallel-size=2"], "transport": "disk", "start_timeout": 900.0}
    file = runs.write(output.with_suffix(".toml"), tree)
    fleet, job = submit(slurm, tmp_path, "rl", str(file), "--fleet=job", HEALTH_CHECK="0")
    job.until(lambda: phase(output) == "update", told="the first step")
    jobs = output / "logs/slurm"
    assert stat.S_IMODE((jobs / "token").stat().st_mode) == 0o600
    token = (jobs / "token").read_text()
    assert not [line for process in slurm.processes() for line in command_line(process) if token in line]
    nodes = fleet.nodes()
    assert len({*nodes, *job.nodes()}) == 3
    keepers = [keeper(slurm, node) for node in nodes]
    assert [len(below(one, "VLLM::Worker")) for one in keepers] == [1, 1], "a tensor-parallel rank on each node"
    keepers[1].kill()
    (life,) = jobs.glob("rl_fleet-*/engines/engine-0.life")
    job.until(lambda: json.loads(life.read_text())["number"] == 2, told="the engine's second life")
    assert fleet.attempts() == []
    hold.unlink()
    job.end()
    assert job.attempts() == ["0"]
    assert [row["logprob_difference_mean"] < BOUND for row in runs.rows(output)] == [True, True]
    assert json.loads(life.read_text())["number"] == 2
    until(lambda: not slurm.call("squeue", "--noheader", "--jobs", fleet.number, check=False), 180)
    assert not (jobs / "fleet").exists()


def phase(output: Path) -> str:
    """What the trainer's first rank does."""
    file = output / "heartbeats/rank_0.json"
    text = file.read_text() if file.exists() else ""
    return str(json.loads(text)["phase"]) if text else ""


def keeper(slurm: Slurm, node: str) -> psutil.Process:
    """The process that starts a node's engines and looks after them."""
    words = ["-m", "megatron_r1.cluster.engines"]
    (found,) = (process for process in slurm.processes(node) if command_line(process)[1:3] == words)
    return found


def below(process: psutil.Process, name: str) -> list[psutil.Process]:
    """What it has started that calls itself so."""
    return [one for one in process.children(recursive=True) if name in " ".join(command_line(one))]
