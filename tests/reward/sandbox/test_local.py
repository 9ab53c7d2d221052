import fcntl
import os
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.job import Program, Run
from megatron_r1.reward.sandbox.local import Local, open_pool

LIMITS = Limits(wall_seconds=30)
TRACEBACK = """Traceback (most recent call last):
  File "main.py", line 3, in <module>
    f()
  File "main.py", line 2, in f
    return 1 / 0
           ~~^~~
ZeroDivisionError: division by zero
"""
SQUARE = """#include <iostream>
int main() { long a; std::cin >> a; if (a < 0) while (true); std::cout << a * a; return a == 3; }
"""
MANY_THREADS = "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(3,)).start()"
BUSY_CHILD = "import os, time\nif os.fork() == 0:\n    while True: pass\ntime.sleep(20)"
AT_THE_END = "import atexit, threading\natexit.register(print, 'z')\nthreading.Timer(0.1, print, 'y').start()"
RECURSIVE = "import sys; sys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(20000))"
HELD_IN_A_CYCLE = "class A: pass\na = A()\na.a = a\na.f = open(1, 'w', closefd=False)\na.f.write('held')"
SHELL = "import subprocess; print(subprocess.run(['cat'], input=b'x', capture_output=True).stdout)"
COMPILED = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module", params=["bubblewrap", "rlimits"])
def local(request: pytest.FixtureRequest) -> Iterator[Local]:
    if request.param == "bubblewrap":
        yield request.getfixturevalue("sandbox")
        return
    opened = Local(open_pool("rlimits", 1))
    yield opened
    opened.close()


def runs(local: Local, source: str, inputs: Sequence[str] = ("",), limits: Limits = LIMITS) -> list[Run]:
    return list(local.run(Program("python", source), inputs, limits))


def test_each_input_gives_its_output(local: Local) -> None:
    numbers = [random.Random(0).randrange(10**6) for _ in range(20)]
    done = runs(local, "import sys\nfor line in sys.stdin: print(int(line) ** 2)", [f"{n}\n" for n in numbers])
    assert [(run.status, run.stdout) for run in done] == [("ok", f"{n**2}\n") for n in numbers]


def test_no_input_is_no_run(local: Local) -> None:
    assert runs(local, "print(1)", []) == []


@pytest.mark.parametrize(
    ("source", "status", "stdout", "stderr"),
    [
        ("print('a'); exit()", "ok", "a\n", ""),
        ("print('a'); import sys; sys.exit(2)", "failed", "a\n", ""),
        ("raise SystemExit('why')", "failed", "", "why\n"),
        (
            "def f():\n    return 1 / 0\nf()",
            "failed",
            "",
            TRACEBACK,
        ),
        ("x = [1] * 10**10", "memory", "", None),
        ("print(input()); print(input())", "failed", "in\n", None),
        ("import os\nprint('a', flush=True)\nos.kill(os.getpid(), 11)", "failed", "a\n", "ended by signal 11\n"),
        ("if True print(1)", "failed", "", None),
        ("if __name__ == '__main__': print(__name__, __file__)", "ok", "__main__ main.py\n", ""),
        (AT_THE_END, "ok", "y\nz\n", ""),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\x00\\r\\n')", "ok", "\ufffd\0\r\n", ""),
        ("print('\\u2028\\x85\\x1c', chr(0x1F600))", "ok", "\u2028\x85\x1c \U0001f600\n", ""),
        ("print(ascii(open('/dev/stdin').read()))", "ok", "'in'\n", ""),
        ("import os; print(os.read(0, os.fstat(0).st_size))", "ok", "b'in'\n", ""),
        ("import mmap; print(mmap.mmap(0, 0, access=mmap.ACCESS_READ)[:])", "ok", "b'in'\n", ""),
        (RECURSIVE, "ok", "20000\n", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nprint(A(1))", "ok", "A(x=1)\n", ""),
        ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)", "ok", "True\n", ""),
        ("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))", "ok", "5\n", ""),
        ("f = open(1, 'w', closefd=False)\nf.write('held')", "ok", "held", ""),
        (HELD_IN_A_CYCLE, "ok", "held", ""),
        ("class A:\n    def __del__(self): print('z')\na = A()\nprint('y')", "ok", "y\nz\n", ""),
        ("import sys\nprint('y')\nsys.stdout.close()", "ok", "y\n", ""),
        ("import os\nos.close(1)\nprint('y')", "failed", "", None),
        ("import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint('y')", "ok", "y\n", ""),
        ("import sys; sys.exit(256)", "ok", "", ""),
        ("import sys; sys.exit(True)", "failed", "", ""),
        (SHELL, "ok", "b'x'\n", ""),
        ("print(2**20000 % 10**9, len(str(3**9000)))", "ok", f"{2**20000 % 10**9} {len(str(3**9000))}\n", ""),
    ],
)  # fmt: skip
def test_programs_end_as_under_python3(local: Local, source: str, status: str, stdout: str, stderr: str | None) -> None:
    (run,) = runs(local, source, ["in"])
    assert (run.status, run.stdout) == (status, stdout)
    assert stderr is None or run.stderr == stderr


@pytest.mark.parametrize(
    ("source", "limits", "status"),
    [
        ("while True: pass", {"cpu_seconds": 0.2}, "timeout"),
        ("import time; time.sleep(60)", {"wall_seconds": 0.5}, "timeout"),
        ("print('x' * 5000)", {"output_kib": 4}, "output"),
        ("x = bytearray(200 << 20)", {"memory_mib": 128}, "memory"),
        ("open('f', 'wb').write(bytes(3 << 20))", {"file_mib": 2}, "failed"),
        ("x = [open('/dev/null') for _ in range(40)]", {"files": 32}, "failed"),
        (MANY_THREADS, {"processes": 8}, "failed"),
        (BUSY_CHILD, {"cpu_seconds": 0.5}, "timeout"),
    ],
)  # fmt: skip
def test_limits_hold_and_leave_the_next_input_alone(
    local: Local, source: str, limits: dict[str, int], status: str
) -> None:
    source = f"if input() == 'over':\n    exec({source!r})\nelse: print(1)"
    done = runs(local, source, ["over", "under"], LIMITS.model_copy(update=limits))
    assert [run.status for run in done] == [status, "ok"]
    assert done[1].stdout == "1\n"


@pytest.mark.parametrize("kind", ["bubblewrap", "rlimits"])
def test_what_the_judge_has_open_is_not_the_programs(kind: str) -> None:
    """A process below has room for as many descriptors as the one that starts it, though it opens none."""
    with Path("/dev/null").open() as null, closing(os.fdopen(fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, 900))):
        local = Local(open_pool(kind, 1))
        try:
            done = runs(local, "import time; time.sleep(0.2); print(1)", limits=LIMITS.model_copy(update={"files": 32}))
            assert [(run.status, run.stdout) for run in done] == [("ok", "1\n")]
        finally:
            local.close()


def test_output_within_the_limit_is_whole(local: Local) -> None:
    (run,) = runs(local, "print('\\0' * 262143)", limits=LIMITS.model_copy(update={"output_kib": 256}))
    assert run.status == "ok"
    assert len(run.stdout) == 262144


def test_large_and_odd_inputs(local: Local) -> None:
    text = "".join(map(chr, range(256))) + "\ud800" + "é" * (2 << 20)
    (run,) = runs(local, "import sys; b = sys.stdin.buffer.read(); print(len(b), hash(b) == hash(bytes(b)))", [text])
    assert run.stdout == f"{len(text.encode('utf-8', 'surrogatepass'))} True\n"


def test_input_larger_than_the_box(local: Local) -> None:
    """It fails, or the box is as large as the disk; either way the next input is served."""
    done = runs(local, "print(1)", ["x" * (3 << 20), ""], LIMITS.model_copy(update={"tmp_mib": 2}))
    assert done[0].status in ("failed", "ok")
    assert done[1].stdout == "1\n"


@COMPILED
def test_cpp(local: Local) -> None:
    """What the program may use is not what the compiler may."""
    update = {"cpu_seconds": 0.5, "compile_seconds": 60, "memory_mib": 32, "processes": 1}
    limits = LIMITS.model_copy(update=update)
    done = list(local.run(Program("cpp", SQUARE), ["2", "-1", "3", "4"], limits))
    assert [(run.status, run.stdout) for run in done] == [("ok", "4"), ("timeout", ""), ("failed", "9"), ("ok", "16")]


@COMPILED
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("int main() { return undefined; }", "undefined"),
        ("#include \"/etc/passwd\"\nint main() {}", "/etc/passwd"),
        ("template <int n> struct A { A<n + 1> a; }; A<0> a; int main() {}", "template"),
    ],
)  # fmt: skip
def test_cpp_that_does_not_compile(sandbox: Local, source: str, says: str) -> None:
    done = list(sandbox.run(Program("cpp", source), ["", ""], LIMITS))
    assert [run.status for run in done] == ["compile_error"] * 2
    assert says in done[0].stderr


@COMPILED
def test_cpp_that_compiles_forever(sandbox: Local) -> None:
    source = "constexpr int f(long n) { int s = 0; for (long i = 0; i < n; i++) s ^= i; return s; }\n"
    source += "".join(f"constexpr int x{i} = f(30000 + {i});\n" for i in range(20000)) + "int main() {}"
    (run,) = sandbox.run(Program("cpp", source), [""], LIMITS.model_copy(update={"compile_seconds": 1.0}))
    assert run.status == "compile_error"
    assert "over its limits" in run.stderr


def test_threads_share_the_boxes(local: Local) -> None:
    outputs: dict[int, list[str]] = {}

    def work(index: int) -> None:
        outputs[index] = [run.stdout for run in runs(local, f"print(input(), {index})", ["a", "b"])]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {index: [f"a {index}\n", f"b {index}\n"] for index in range(6)}


def test_who_stops_asking_has_the_rest_not_done(sandbox: Local) -> None:
    first = sandbox.run(Program("python", "print(input())"), ["a", "b"], LIMITS)
    assert next(first).stdout == "a\n"
    first.close()


def test_closed() -> None:
    opened = Local(open_pool("rlimits", 1))
    opened.close()
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        runs(opened, "print(1)")
