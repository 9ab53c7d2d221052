"""What befalls jobs, with a program in place of the run that is quick and knows nothing (`stand_in.py`)."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.runs import ROOT
from tests.processes import command_line
from tests.slurm.cluster import Slurm, until, wait
from tests.slurm.jobs import Job
from tests.slurm.stand_in import STEPS

STAND_IN = Path(__file__).with_name("stand_in.py")
TWO_PARTS = ["--nodes=1", "--exclusive", ":", "--nodes=2", "--exclusive", "--requeue"]
"""What a script says of itself is of its first part alone."""


class Jobs:
    """Submits scripts whose run is the stand-in; words of the command line and folders have spaces."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder, self.output = slurm, folder, folder / "run"
        self.output.mkdir()
        self.scripts = folder / "of a site/slurm"
        self.scripts.parent.mkdir()
        self.scripts.symlink_to(ROOT / "slurm")

    def submit(self, script: str, *options: str, **environment: str) -> Job:
        own = {"MEGATRON_R1_PYTHON": str(STAND_IN), "STAND_IN_OUTPUT": str(self.output), "HEALTH_CHECK": "0"}
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(self.scripts / f"{script}.sbatch"), "run.toml", "--title=A b  c"],
            env=self.slurm.environment | own | environment, cwd=self.folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return Job(self.slurm, done.stdout.strip(), self.folder)

    @property
    def hold(self) -> Path:
        """As long as this file is there, runs that nobody has asked to end wait before their next step."""
        return self.output / "hold"

    def step(self, number: int) -> bool:
        return (self.output / f"checkpoints/step_{number:08d}").exists()

    def runs(self) -> list[dict[str, Any]]:
        file = self.output / "runs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def jobs(slurm: Slurm, tmp_path: Path) -> Jobs:
    until(lambda: slurm.states() == dict.fromkeys(slurm.nodes, "idle"), 180, lambda: str(slurm.states()))
    return Jobs(slurm, tmp_path)


def test_asked_before_its_limit_it_saves_and_is_requeued(jobs: Jobs) -> None:
    jobs.hold.touch()
    job = jobs.submit("sft", "--nodes=1")
    job.until(lambda: len(jobs.runs()) == 1)
    jobs.slurm.call("scancel", "--signal=USR1", "--batch", job.number)
    job.until(lambda: job.attempts() == ["75"])
    jobs.hold.unlink()
    job.end()
    assert job.attempts() == ["75", "0"]
    assert [run["arguments"] for run in jobs.runs()] == 2 * [["sft", "run.toml", "--title=A b  c"]]
    assert jobs.step(STEPS)


def test_cancelled_it_saves_and_stays_so(jobs: Jobs) -> None:
    jobs.hold.touch()
    job = jobs.submit("sft", "--nodes=1")
    job.until(lambda: len(jobs.runs()) == 1)
    jobs.slurm.call("scancel", job.number)
    job.until(lambda: job.attempts() == ["75"])
    assert wait(lambda: job.state() == "CANCELLED", 120)


@pytest.mark.parametrize(("code", "expected"), [(1, ["1", "1", "1"]), (2, ["2"]), (74, ["74"])])
def test_failures_are_bounded(jobs: Jobs, code: int, expected: list[str]) -> None:
    (jobs.output / "do").write_text(str(code))
    job = jobs.submit("sft", "--nodes=1")
    job.until(lambda: job.state() == "FAILED")
    assert job.attempts() == expected
    assert jobs.slurm.job(job.number)["ExitCode"] == f"{code}:0"


def test_a_job_of_the_wrong_size_is_told_the_right_one(jobs: Jobs) -> None:
    job = jobs.submit("sft", "--nodes=2")
    job.until(lambda: job.state() == "FAILED")
    assert "asks for --nodes=1, this job has 2; " in job.said()
    assert jobs.runs() == []


def test_nodes_that_hung_are_left_out(jobs: Jobs) -> None:
    (jobs.output / "heartbeats").mkdir()
    (jobs.output / "do").write_text("69")
    told = (
        "  not answering: rank 1 (host n1, pid 4711): step 3, phase update, 3 s\n  waiting: rank 0 (host n2, pid 1)\n"
    )
    (jobs.output / "heartbeats/hang.txt").write_text(told)
    job = jobs.submit("sft", "--nodes=1", "--nodelist=n1", MAX_FAILURES="2")
    job.until(lambda: "requeued" in job.said())
    until(lambda: jobs.slurm.job(job.number).get("ExcNodeList") == "n1", 120)
    jobs.slurm.call("scancel", job.number)


def test_engines_on_nodes_of_their_own(jobs: Jobs) -> None:
    """The run is told where they are, and nothing of them is left when it is done."""
    job = jobs.submit("rl", *TWO_PARTS)
    job.end()
    assert job.attempts() == ["0"]
    (run,) = jobs.runs()
    addresses = next(word for word in run["arguments"] if word.startswith("--rollout.addresses="))
    assert addresses.count("http://127.0.0.1:960") == 2
    assert len(run["token"]) > 30
    left = [command_line(process) for process in jobs.slurm.processes() if number(process) == job.number]
    assert [words for words in left if str(STAND_IN) in words or words[:1] == ["sleep"]] == []


def number(process: psutil.Process) -> str:
    """Of its job."""
    with suppress(psutil.NoSuchProcess):
        return process.environ().get("SLURM_JOB_ID", "")
    return ""


@pytest.mark.parametrize("script", ["rl", "rl_fleet"])
def test_an_engine_that_does_not_start(jobs: Jobs, script: str) -> None:
    """Others may wait for it, and would for ever."""
    (jobs.output / "engine").write_text("2")
    parts = {"rl": TWO_PARTS, "rl_fleet": ["--nodes=2"]}[script]
    job = jobs.submit(script, *parts)
    job.until(lambda: job.state() == "FAILED")
    assert job.attempts() == ["2"]
    assert "the engines did not start; see " in job.said()
    assert jobs.runs() == []


def test_what_keeps_engines_is_replaced_when_it_is_killed(jobs: Jobs) -> None:
    """Three times, and the run goes on; once more, and it saves, and the job goes on anew."""
    jobs.hold.touch()
    job = jobs.submit("rl", *TWO_PARTS)
    job.until(lambda: len(jobs.runs()) == 1)
    node = job.nodes(part=1)[-1]

    words = [str(STAND_IN), "-m", "megatron_r1.cluster.engines"]
    killed: list[psutil.Process] = []

    def kill_four() -> bool:
        for process in jobs.slurm.processes(node) if len(killed) < 4 else []:
            if process not in killed and command_line(process)[1:4] == words:
                process.kill()
                killed.append(process)
        return len(killed) == 4

    job.until(kill_four)
    assert len(jobs.runs()) == 1
    job.until(lambda: job.attempts() == ["75"])
    jobs.hold.unlink()
    job.end()
    assert job.attempts() == ["75", "0"]
    assert f"node {node}: the process that keeps its engines was killed, again and again" in job.said()
    assert len(jobs.runs()) == 2


def test_engines_of_another_job_that_moves(jobs: Jobs) -> None:
    """In the same job of the trainer; when that is done, the engines' job ends, too."""
    jobs.hold.touch()
    job = jobs.submit("rl_learner", "--nodes=1")
    fleet = jobs.submit("rl_fleet", "--nodes=2")
    job.until(lambda: len(jobs.runs()) == 1)
    jobs.slurm.call("scontrol", "requeue", fleet.number)
    job.until(lambda: len(jobs.runs()) == 2)
    jobs.hold.unlink()
    job.end()
    assert job.attempts() == ["0"]
    first, second = jobs.runs()
    assert first["token"] == second["token"] != ""
    assert first["arguments"] != second["arguments"]
    assert wait(lambda: fleet.state() == "CANCELLED", 120)


def test_strays_are_ended(jobs: Jobs) -> None:
    """A process that an earlier job has left, and not one of a job that runs."""
    jobs.hold.touch()
    running = jobs.submit("sft", "--nodes=1", "--nodelist=n4")
    running.until(lambda: len(jobs.runs()) == 1)
    cluster = {"SLURM_CLUSTER_NAME": jobs.slurm.call("scontrol", "show", "config").split("ClusterName")[1].split()[1]}
    strays = [
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(3000)"],
            env={"MEGATRON_R1_ATTEMPT": f"{jobs.folder}/sft-{number}-0", "SLURMD_NODENAME": node, **cluster},
        )
        for number, node in (("999", "n2"), (running.number, "n2"), ("999", "n3"))
    ]
    try:
        job = jobs.submit("sft", "--nodes=1", "--nodelist=n2")
        job.until(lambda: "ending processes that an earlier attempt has left: 1" in job.said())
        assert strays[0].wait(120) == -15
        assert [stray.poll() for stray in strays[1:]] == [None, None]
        jobs.slurm.call("scancel", job.number, running.number)
    finally:
        for stray in strays:
            stray.kill()
            stray.wait()
