import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import psutil
import pytest

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.box import Stopped
from megatron_r1.reward.sandbox.local import open_pool
from megatron_r1.reward.sandbox.pool import Pool
from tests.processes import outlive
from tests.reward.sandbox.conftest import settle

LIMITS = Limits(wall_seconds=30)
LOAD = {"do": "load", "language": "python", "source": "import time; time.sleep(60)", "limits": LIMITS.model_dump()}


@pytest.fixture(params=["bubblewrap", "rlimits"])
def kind(request: pytest.FixtureRequest, pool: Pool) -> str:
    settle()
    return str(request.param)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    assert not outlive(processes, 20)


def test_close_leaves_no_process_and_frees_who_waits(kind: str) -> None:
    before = set(psutil.Process().children(recursive=True))
    opened = open_pool(kind, 2)
    outcome: list[Exception] = []

    def work() -> None:
        try:
            with opened.take(LIMITS) as box:
                box.send(LOAD)
                box.receive(time.monotonic() + 30)
                box.send({"do": "run", "text": ""})
                box.receive(time.monotonic() + 30)
        except (Stopped, EngineError) as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    opened.close()
    thread.join(20)
    assert len(outcome) == 1
    wait_until_gone(list(set(psutil.Process().children(recursive=True)) - before))


PARENT = """
import sys, threading, time
from megatron_r1.reward.sandbox.local import Local, open_pool
from megatron_r1.reward.sandbox.job import Limits, Program
runs = Local(open_pool(sys.argv[1], 2)).run(
    Program('python', {program!r}), [''], Limits(wall_seconds=60, cpu_seconds=60)
)
threading.Thread(target=list, args=(runs,)).start()
time.sleep(1)
print('running', flush=True)
time.sleep(60)
"""
CLINGING = "import os, signal, time\nos.setsid()\nfor _ in range(3): os.fork()\nsignal.signal(15, 1)\ntime.sleep(60)"


def test_boxes_die_with_a_trainer_that_is_killed(kind: str, tmp_path: Path) -> None:
    """Only their folders stay, of those that have any outside."""
    command = [sys.executable, "-c", PARENT.format(program=CLINGING), kind]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "running\n"
        below = psutil.Process(trainer.pid).children(recursive=True)
        assert len(below) > 8
        os.kill(trainer.pid, signal.SIGKILL)
    wait_until_gone(below)


def test_a_box_that_was_killed_while_it_waited_is_replaced(kind: str) -> None:
    before = set(psutil.Process().children(recursive=True))
    with contextlib.closing(open_pool(kind, 1)) as opened:
        time.sleep(0.3)
        for process in set(psutil.Process().children(recursive=True)) - before:
            process.kill()
        time.sleep(0.3)
        with opened.take(LIMITS) as box:
            box.send(LOAD)
            assert box.receive(time.monotonic() + 30) == {"status": "ok"}


def test_a_user_who_has_no_more_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in a box can use up what the kernel lets a user have: boxes then start with small ones."""

    def refuse(file: IO[bytes], command: int, size: int) -> None:
        resize(file, command, 4096)
        raise PermissionError

    resize = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with contextlib.closing(open_pool("bubblewrap", 1)) as opened, opened.take(LIMITS) as box:
        box.send(LOAD | {"source": "#" * 100_000})
        assert box.receive(time.monotonic() + 30) == {"status": "ok"}


def test_other_sizes_get_boxes_of_their_own(pool: Pool) -> None:
    limits = LIMITS.model_copy(update={"tmp_mib": 3})
    load = LOAD | {"source": "import os; s = os.statvfs('.'); print(s.f_blocks * s.f_frsize)"}
    with pool.take(limits) as box:
        box.send(load)
        box.receive(time.monotonic() + 30)
        box.send({"do": "run", "text": ""})
        assert int(str(box.receive(time.monotonic() + 30)["stdout"])) == 3 << 20


def test_replies_are_bounded(pool: Pool) -> None:
    with pool.take(LIMITS) as box:
        box.send(LOAD | {"source": "print('x' * 10000)"})
        box.receive(time.monotonic() + 30)
        box.send({"do": "run", "text": ""})
        with pytest.raises(Stopped) as stopped:
            box.receive(time.monotonic() + 30, most=1000)
    assert stopped.value.status == "output"


def test_a_late_reply_ends_the_box(pool: Pool) -> None:
    with pool.take(LIMITS) as box:
        box.send(LOAD)
        box.receive(time.monotonic() + 30)
        box.send({"do": "run", "text": ""})
        with pytest.raises(Stopped) as stopped:
            box.receive(time.monotonic() + 0.3)
        assert stopped.value.status == "timeout"
        with pytest.raises((Stopped, ValueError, OSError)):
            box.send(LOAD)
