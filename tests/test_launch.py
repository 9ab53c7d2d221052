"""Several processes from one command: exit codes, what is said, and who is left."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_r1.launch import _Relay
from tests.processes import outlive

ROOT = Path(__file__).parents[1]
# Python imports this module at its start. It stands in for the verb's own code; everything around it is real.
SITECUSTOMIZE = """
import os, sys, time, types
from pathlib import Path

def run(config):
    rank = os.environ["RANK"]
    Path(f"rank-{rank}").write_text(str(os.getpid()))
    if os.environ["CASE"] == "refuse":
        from megatron_r1.errors import ConfigError
        from megatron_r1.train.heartbeat import Heartbeat
        with Heartbeat(config.output, config.guard, int(rank), 2, "rl"):
            time.sleep(float(rank == "0"))
            raise ConfigError("nobody can use this")
    if os.environ["CASE"] == "crash" and rank == "1":
        time.sleep(2)
        os._exit(7)
    if os.environ["CASE"] in ("wait", "crash"):
        time.sleep(100)
    return {"processes": int(os.environ["WORLD_SIZE"])}

sys.modules["megatron_r1.train.rl"] = types.SimpleNamespace(run=run)
"""
PATIENT = "import sys; from megatron_r1 import cli; cli.FIRST_RANK_SECONDS = 0.1; sys.exit(cli.main(sys.argv[1:]))"


def environment(where: Path, case: str, **more: str) -> dict[str, str]:
    path = f"{where}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "CASE": case, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def where(tmp_path: Path, rl_file: Path) -> Path:
    """A folder with `rl.toml` and the stand-in."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return tmp_path


class Started:
    """`megatron-r1 rl` in two processes."""

    def __init__(self, where: Path, case: str) -> None:
        self.where = where
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_r1.cli", "rl", "rl.toml", "--parallel.processes=2", "--json"],
            cwd=where, env=environment(where, case), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        """Wait until both run."""
        deadline = time.monotonic() + 60
        files = [self.where / "rank-0", self.where / "rank-1"]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return [psutil.Process(int(file.read_text())) for file in files]

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=60)
        assert "Traceback" not in errors
        return self.process.returncode, output, errors


@pytest.fixture
def waiting(where: Path) -> Iterator[Started]:
    """Two processes in the middle of their work; none may be left."""
    started = Started(where, "wait")
    ranks = started.ranks()
    yield started
    alive = outlive(ranks, 10)
    started.process.kill()
    for process in alive:
        process.kill()
    assert not alive


def test_the_first_rank_speaks(where: Path) -> None:
    code, output, errors = Started(where, "done").end()
    assert (code, errors) == (0, "")
    assert json.loads(output) == {"processes": 2}


def test_an_error_of_every_rank_is_said_once(where: Path) -> None:
    """Though the second meets it first. Of the run nothing is left."""
    code, output, errors = Started(where, "refuse").end()
    assert (code, output, errors) == (2, "", "megatron-r1 rl: nobody can use this\n")
    assert not (where / "runs").exists()


def test_a_process_that_dies_ends_the_others(where: Path) -> None:
    started = Started(where, "crash")
    ranks = started.ranks()
    assert started.end()[0] == 7
    assert not outlive(ranks, 10)


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_handed_on(waiting: Started, sent: signal.Signals, expected: int) -> None:
    waiting.process.send_signal(sent)
    code, output, errors = waiting.end()
    assert (code, output) == (expected, "")
    [line] = errors.splitlines()
    assert line.startswith("megatron-r1 rl: interrupted")


def test_a_signal_after_their_end_leaves_their_exit_code() -> None:
    told: list[int] = []
    rank = types.SimpleNamespace(send_signal=told.append)
    left = [[rank], [], []]
    relay = _Relay(types.SimpleNamespace(children=lambda: left.pop(0)))
    relay(signal.SIGUSR1, None)
    relay(signal.SIGUSR1, None)
    relay(signal.SIGTERM, None)
    assert told == [signal.SIGUSR1]
    relay.rest()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        _Relay(types.SimpleNamespace(children=list))(signal.SIGUSR1, None)
    assert ended.value.code == 138, "none has begun"


def test_a_killed_launcher_takes_its_processes_along(waiting: Started) -> None:
    os.killpg(waiting.process.pid, signal.SIGKILL)
    assert waiting.process.wait(10) == -signal.SIGKILL


def test_what_only_another_rank_sees_is_said_by_it(where: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PATIENT, "rl", "rl.toml"],
        cwd=where, env=environment(where, "refuse", RANK="1"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "megatron-r1 rl (rank 1): nobody can use this\n")
