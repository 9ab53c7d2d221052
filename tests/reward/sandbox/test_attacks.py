"""Attacks from within a box. What counts is what can be seen from outside."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
import pytest

from megatron_r1 import errors
from megatron_r1.config.sandbox import Limits
from megatron_r1.reward.sandbox.job import Program, Run
from megatron_r1.reward.sandbox.local import Local
from tests.reward.sandbox.attacks import CALLS, ESCAPES, FORGERIES, LASTING, READS, SYSCALLS, WRITES
from tests.reward.sandbox.bombs import BOMBS, HOARDS
from tests.reward.sandbox.conftest import WARM, settle, started

LIMITS = Limits(cpu_seconds=5, wall_seconds=30)
TIGHT = Limits(cpu_seconds=0.5, wall_seconds=1, memory_mib=128, processes=16)
HONEST = "print(sum(map(int, input().split())))"
SECRET = f"secret-{secrets.token_hex(8)}"
SOURCE_SECRET = "only the source of this test says so"


@dataclass
class Scene:
    """What the attacks are after."""

    folder: Path
    listeners: list[socket.socket] = field(default_factory=list)

    def fill(self, source: str) -> str:
        values = {
            "pid": os.getpid(),
            "answers": self.folder / "answers.py",
            "folder": self.folder,
            "home": self.folder,
            "test": Path(__file__).resolve(),
            "project": Path(errors.__file__).resolve(),
            "path": self.folder / "target",
            "abstract": f"attack-{os.getpid()}",
            "socket": self.folder / "socket",
            "tcp": self.listeners[0].getsockname()[1],
            "udp": self.listeners[1].getsockname()[1],
        }
        for name, value in values.items():
            source = source.replace(f"{{{name}}}", str(value))
        return source

    def touched(self) -> bool:
        """Whether anything reached one of the listeners."""
        for listener in self.listeners:
            try:
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(100)
            except BlockingIOError:
                continue
            return True
        return False


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = Scene(tmp_path_factory.mktemp("scene"))
    (made.folder / "answers.py").write_text(f"SECRET = '{SECRET}'\n")
    (made.folder / ".netrc").write_text(SECRET)
    for family, kind, address in (
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"\0attack-{os.getpid()}"),
        (socket.AF_UNIX, socket.SOCK_STREAM, str(made.folder / "socket")),
    ):
        listener = socket.socket(family, kind)
        listener.bind(address)
        listener.setblocking(False)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        made.listeners.append(listener)
    os.environ["ATTACK_SECRET"] = SECRET
    yield made
    del os.environ["ATTACK_SECRET"]
    for listener in made.listeners:
        listener.close()


@pytest.fixture(autouse=True)
def nothing_left(sandbox: Local) -> Iterator[None]:
    """After each attack."""
    yield
    settle()


class Peak(threading.Thread):
    """The most that was seen below this process meanwhile."""

    def __enter__(self) -> Self:
        self.processes = self.memory_mib = 0
        self.over = threading.Event()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(0.05):
            below = started()
            memory = 0
            for process in below:
                with contextlib.suppress(psutil.Error):
                    memory += process.memory_full_info().pss >> 20  # pages shared since a fork count once
            self.processes, self.memory_mib = max(self.processes, len(below)), max(self.memory_mib, memory)


def one(sandbox: Local, source: str, limits: Limits = LIMITS, text: str = "") -> Run:
    return next(iter(sandbox.run(Program("python", source), [text], limits)))


def outside(source: str, folder: Path) -> str:
    """What the program prints without a sandbox."""
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout


@pytest.mark.parametrize("name", READS)
def test_reads_nothing(name: str, sandbox: Local, scene: Scene) -> None:
    run = one(sandbox, scene.fill(READS[name]))
    assert run.status in ("ok", "failed")
    for known in (SECRET, SOURCE_SECRET, "UserError"):
        assert known not in run.stdout
        assert known not in run.stderr


def _secret_environment() -> str:
    """`/proc/<pid>/environ` shows what a process was started with."""
    return f"import subprocess, sys; subprocess.run([sys.executable, '-c', {READS['environment_of_parent']!r}])"


@pytest.mark.parametrize("name", [name for name in READS if "first" not in name and name != "file_by_hard_link"])
def test_the_same_reads_succeed_without_a_sandbox(name: str, scene: Scene, tmp_path: Path) -> None:
    source = scene.fill(READS[name])
    if name == "environment_of_trainer":
        source = "import os; " + source.replace(str(os.getpid()), "{}").replace("'/proc/{}", "f'/proc/{os.getpid()}")
    said = outside(_secret_environment() if name == "environment_of_parent" else source, tmp_path)
    assert any(known in said for known in (SECRET, SOURCE_SECRET, "UserError", "pytest"))


@pytest.mark.parametrize("name", WRITES)
def test_writes_nothing_outside(name: str, sandbox: Local, scene: Scene, tmp_path: Path) -> None:
    target = scene.folder / "target"
    target.write_text("as it was")
    one(sandbox, scene.fill(WRITES[name]))
    assert target.read_text() == "as it was"
    if name == "as_database":
        target.unlink()
    outside(scene.fill(WRITES[name]), scene.folder)  # a control: it is a real attack
    assert target.read_bytes() != b"as it was"
    for path in ("link", "mine"):
        (scene.folder / path).unlink(missing_ok=True)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize("name", SYSCALLS)
def test_system_calls_are_refused(name: str, sandbox: Local) -> None:
    assert one(sandbox, CALLS[name]).stdout == "refused\n"


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SYSCALLS])
def test_rights_are_refused(name: str, sandbox: Local, scene: Scene) -> None:
    devices = Path("/dev/null").stat().st_mode
    assert one(sandbox, scene.fill(CALLS[name])).stdout == "refused\n"
    assert not scene.touched()
    assert Path("/dev/null").stat().st_mode == devices
    for path in (
        "/harm",
        "/usr/bin/harm",
        "/etc/ld.so.preload",
        "/dev/harm",
        Path(os.__file__).parent / "harm.py",
    ):
        assert not Path(path).exists()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped(name: str, sandbox: Local) -> None:
    before = time.monotonic()
    with Peak() as peak:
        run = one(sandbox, BOMBS[name], TIGHT)
    assert run.status in ("failed", "timeout", "memory", "output")
    assert len(run.stdout) <= TIGHT.output_kib << 10
    assert len(run.stderr) < 5000
    assert time.monotonic() - before < 20
    assert peak.processes <= 2 * WARM + 3 + TIGHT.processes
    assert peak.memory_mib < 1024
    assert one(sandbox, HONEST, text="1 2").stdout == "3\n"


@pytest.mark.parametrize("name", HOARDS)
def test_limits_hold_whatever_is_waited_for(name: str, sandbox: Local) -> None:
    source, check = HOARDS[name]
    (run,) = sandbox.check(Program("python", source), "", [check], TIGHT.model_copy(update={"wall_seconds": 10}))
    assert run.status == "memory"


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outlives_its_run(name: str, sandbox: Local) -> None:
    """And the runs after it are as they would have been."""
    program = Program("python", f"if input() == 'attack':\n{_indent(ESCAPES[name])}\nelse: print(2)")
    runs = sandbox.run(program, ["attack", "no", "no"], LIMITS)
    assert [run.stdout for run in runs][1:] == ["2\n", "2\n"]


@pytest.mark.parametrize("name", FORGERIES)
def test_nobody_is_right_without_the_answer(name: str, sandbox: Local) -> None:
    """The expected output is never in a box, so the most that forging gains is a wrong answer."""
    expected = f"expected-{secrets.token_hex(16)}"
    second = secrets.token_hex(16)
    runs = list(sandbox.run(Program("python", FORGERIES[name]), ["first", second], LIMITS))
    assert len(runs) == 2
    assert all(expected not in run.stdout and expected not in run.stderr for run in runs)
    assert second not in runs[0].stdout, "inputs come one by one"
    control = sandbox.run(Program("python", "print(input())"), [expected, "two"], LIMITS)
    assert [(run.status, run.stdout) for run in control] == [("ok", f"{expected}\n"), ("ok", "two\n")]


@pytest.mark.parametrize("name", LASTING)
def test_nothing_lasts(name: str, sandbox: Local) -> None:
    """Not to the next input, and not to the next box."""
    limits = LIMITS.model_copy(update={"wall_seconds": 10.0})
    for _ in range(2):
        runs = sandbox.run(Program("python", LASTING[name]), ["", ""], limits)
        assert [run.stdout for run in runs] == ["clean\n", "clean\n"]


def test_there_are_enough() -> None:
    assert sum(map(len, (READS, WRITES, CALLS, BOMBS, ESCAPES, FORGERIES, LASTING))) >= 150


def _indent(source: str) -> str:
    return "\n".join("    " + line for line in source.splitlines())
