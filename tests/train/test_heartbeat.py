"""Real processes, one of which stops, hangs or dies in the middle of a collective: the run ends and names it."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.train.heartbeat import FOLDER, HANG, HUNG, Beat, Heartbeat, _behind, read
from tests.train.heartbeat_program import FAULTY, FAULTY_STEP, GUARD, RANKS

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


class Ended:
    """What three processes left, one of which had a fault in a phase."""

    def __init__(self, output: Path, fault: str, phase: str = "update") -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tests.train.heartbeat_program", str(output), fault, phase],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=400,
        )  # fmt: skip
        result: dict[str, Any] = json.loads(done.stdout)
        self.codes, self.pids, self.errors = result["codes"], result["pids"], done.stderr
        assert not [pid for pid in self.pids if psutil.pid_exists(pid)]

    def names_the_faulty(self) -> re.Match[str] | None:
        """Its line, with rank, host, process, step and phase."""
        line = (
            rf"rank {FAULTY} \(host {re.escape(HOST)}, pid {self.pids[FAULTY]}\): "
            rf"step {FAULTY_STEP}, phase update, [0-9]+ s"
        )
        return re.search(rf"^  ([a-z ]+): {line}(?:; (.*))?$", self.errors, re.MULTILINE)


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
    ended = Ended(tmp_path, "stop")
    named = ended.names_the_faulty()
    assert named
    assert named.groups() == ("not answering", "the process is stopped (SIGSTOP)")
    assert ended.codes == [HUNG, -signal.SIGKILL, HUNG]
    assert ended.errors.count("has waited longer than the 2 s of phase update") == 1
    assert ended.errors.strip() == (tmp_path / FOLDER / HANG).read_text().strip()


def test_a_sleeping_rank_is_named_with_its_stack(tmp_path: Path) -> None:
    ended = Ended(tmp_path, "sleep")
    named = ended.names_the_faulty()
    assert named
    assert named.group(1) == "holding up the others"
    assert "time.sleep(1000)" in ended.errors
    assert len(re.findall("^  waiting: rank ", ended.errors, re.MULTILINE)) == RANKS - 1
    assert ended.codes == [HUNG] * RANKS


def test_a_stuck_interpreter_is_named_with_its_stack(tmp_path: Path) -> None:
    ended = Ended(tmp_path, "hold_the_interpreter")
    named = ended.names_the_faulty()
    assert named
    assert named.groups() == ("not answering", "the process is there, but its interpreter is stuck")
    assert "in hold_the_interpreter" in ended.errors
    assert ended.codes == [HUNG, -signal.SIGKILL, HUNG]


def test_a_killed_rank_is_named_by_the_others(tmp_path: Path) -> None:
    ended = Ended(tmp_path, "die")
    assert ended.codes == [1, -signal.SIGKILL, 1]
    text = (
        f"another process is gone, noticed in step {FAULTY_STEP}, phase update; last heard of rank {FAULTY} "
        f"(host {HOST}, pid {ended.pids[FAULTY]}): step {FAULTY_STEP}, phase update"
    )
    assert f"rank 0 says: {text}" in ended.errors


def test_a_phase_may_have_a_deadline_of_its_own(tmp_path: Path) -> None:
    ended = Ended(tmp_path, "take_long", "rollout")
    assert (ended.codes, ended.errors) == ([0] * RANKS, "")
    assert not (tmp_path / FOLDER / HANG).exists()


def test_a_job_that_was_suspended_is_not_late(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.heartbeat_program", str(tmp_path), "take_long", "rollout"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        while len(read(tmp_path / FOLDER, RANKS)) < RANKS:
            assert started.poll() is None
            time.sleep(0.05)
        ranks = psutil.Process(started.pid).children()
        for rank in ranks:
            rank.suspend()
        time.sleep(2 * GUARD.deadline)
        for rank in ranks:
            rank.resume()
        output, errors = started.communicate(timeout=240)
    assert (json.loads(output)["codes"], errors) == ([0] * RANKS, "")


def test_ranks_count_the_same_phases_when_weights_are_sent_again(tmp_path: Path) -> None:
    """Else a rank that goes on would be named for one that hangs: the first rank alone asks engines and the judge."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.collector_program", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    first, second = json.loads(done.stdout.splitlines()[-1]).values()
    # Begun and ended: 5 pushes, 2 rollouts; begun and broken off: 4.
    assert first == second == 2 * (5 + 2) + 4


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path, begun: bool) -> None:
    """Unless a phase has begun, or there was something before."""
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/notes").touch()

    def refused(output: Path) -> None:
        with Heartbeat(output, GUARD, 0, 1, "megatron-r1 test") as heartbeat:
            if begun:
                heartbeat.beat(0, "start")
            raise ConfigError("no")

    for output in (tmp_path / "runs/first", tmp_path / "earlier"):
        with pytest.raises(ConfigError):
            refused(output)
        assert (output / FOLDER / "rank_0.json").exists() == begun
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if FOLDER not in path.parts}
    assert names == {"earlier", "earlier/notes"} | ({"runs", "runs/first"} if begun else set())


def beat(rank: int, step: int, beats: int, frame: str = "") -> Beat:
    return Beat(rank, HOST, 1, 0.0, step, "update", beats, stack=(frame,) if frame else ())


WAITING = "/torch/distributed/distributed_c10d.py:9 all_reduce: work.wait()"


@pytest.mark.parametrize(
    ("beats", "behind"),
    [
        ([beat(0, 5, 12, WAITING), beat(1, 4, 10, WAITING), beat(2, 5, 12, WAITING)], [1]),
        ([beat(0, 5, 12, WAITING), beat(1, 5, 12, "model.py:3 forward: x @ w"), beat(2, 5, 12, WAITING)], [1]),
        ([beat(0, 5, 12, WAITING), beat(1, 5, 12, WAITING), beat(2, 5, 11, WAITING)], [2]),
        ([beat(0, 5, 12, "a.py:1 f: g()"), beat(1, 5, 11, "a.py:1 f: g()")], [1]),
        ([beat(0, 5, 12, WAITING), beat(1, 5, 12, WAITING)], [0, 1]),
    ],
    ids=["an earlier step", "not in a collective", "an earlier phase", "all busy", "nothing tells"],
)
def test_who_is_behind(beats: list[Beat], behind: list[int]) -> None:
    assert _behind({beat.rank: beat for beat in beats}) == behind
