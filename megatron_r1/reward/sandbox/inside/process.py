"""Inside a box: one process of untrusted code with its limits, and how it ended."""
# ruff: noqa: PTH123, PTH208, SIM105
# pathlib and contextlib would slow the start of every box.

from __future__ import annotations

import os
import resource
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

SIGKILL = 9
TICK = 0.02
STACK = 64 << 20
STDERR_TAIL = 4096
DIAGNOSTICS = ("MemoryError", "std::bad_alloc", "Cannot allocate memory")


class Leave(BaseException):
    """Raised in a new process to unwind the box's own code, so that the interpreter then ends as it always does."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.body = body


class Child:
    """A running process and the pipes it writes to."""

    def __init__(self, pid: int, stdout: int, stderr: int) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.ended = os.pidfd_open(pid)
        os.set_blocking(stdout, False)
        os.set_blocking(stderr, False)
        self.started = time.monotonic()

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in (self.stdout, self.stderr, self.ended):
            os.close(fd)


def start(body: Callable[[], Any], limits: dict[str, Any], stdin: int) -> Child:
    """Fork a process that has `stdin` and two pipes, and nothing else, and calls `body`."""
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _prepare((stdin, out_end, err_end), limits)
        raise Leave(body)
    os.close(out_end)
    os.close(err_end)
    return Child(pid, out, err)


def _counts_processes() -> bool:
    """Whether the kernel counts the processes of this box alone: it has its own user, and Linux is 5.14 or newer.

    Otherwise the limit would be one for all processes of the user outside; then only the watch from outside counts.
    """
    major, minor = os.uname().release.split(".")[:2]
    return os.getppid() <= 1 and (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 14)


def _prepare(standard: tuple[int, int, int], limits: dict[str, Any]) -> None:
    for target, fd in enumerate(standard):
        os.dup2(fd, target)
    os.closerange(3, 65536)
    limit(limits)


def limit(limits: dict[str, Any]) -> None:
    """Set this process's limits, for good."""
    cpu = int(limits["cpu_seconds"]) + 1
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK if stack == resource.RLIM_INFINITY else min(STACK, stack)
    for name, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, limits["memory_mib"] << 20),
        (resource.RLIMIT_FSIZE, limits["file_mib"] << 20),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_STACK, stack),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(name)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (most, most))
    if _counts_processes():
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"] + 1,) * 2)


def collect(child: Child, limits: dict[str, Any], lifeline: int) -> dict[str, Any]:
    """Read what the process writes until it ends or is over a limit; then every process of the box is dead.

    Args:
        child: from `start`.
        limits: as in `start`.
        lifeline: the descriptor that commands come from; when its other end closes, so does the box.
    """
    stdout, stderr = bytearray(), bytearray()
    most = limits["output_kib"] << 10
    poll = select.poll()
    for fd in (child.stdout, child.stderr, child.ended):
        poll.register(fd, select.POLLIN)
    poll.register(lifeline, 0)
    stopped = None
    end = child.started + limits["wall_seconds"]
    while stopped is None:
        events = dict(poll.poll(max(0.0, min(TICK, end - time.monotonic())) * 1000))
        if lifeline in events:
            _leave()
        _read(poll, events, child.stdout, stdout)
        _read(poll, events, child.stderr, stderr)
        del stderr[:-STDERR_TAIL]
        if len(stdout) > most:
            stopped = "output"
        elif child.ended in events:
            break
        elif time.monotonic() >= end or _all_cpu_seconds() > limits["cpu_seconds"]:
            stopped = "timeout"
    code, used = _end(child)
    _drain(child.stdout, stdout, most)
    _drain(child.stderr, stderr, most)
    child.close()
    if stopped is None and used > limits["cpu_seconds"]:
        stopped = "timeout"
    text = bytes(stderr[-STDERR_TAIL:]).decode("utf-8", "replace")
    return {
        "status": stopped or _status(code, len(stdout) > most, text),
        "stdout": bytes(stdout[:most]).decode("utf-8", "replace"),
        "stderr": text + (f"ended by signal {-code}\n" if code < 0 and stopped is None else ""),
    }


def cpu_seconds(pid: int) -> float:
    """Processor time of a process that has not been waited for (its clock's id is CPUCLOCK_SCHED of the pid)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def _all_cpu_seconds() -> float:
    """Processor time of all that runs in this box but its own first process."""
    return sum(map(cpu_seconds, descendants(os.getpid())))


def kill_all() -> None:
    """Kill every process that was started in this box, its descendants included, and wait for them."""
    while True:
        if os.getpid() == 1:
            _signal(-1)
        else:
            for pid in descendants(os.getpid()):
                _signal(pid)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def descendants(pid: int) -> list[int]:
    """Ids of all processes below one; used outside of boxes too."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        above = waiting.pop()
        try:
            for task in os.listdir(f"/proc/{above}/task"):
                with open(f"/proc/{above}/task/{task}/children") as file:
                    children = list(map(int, file.read().split()))
                found += children
                waiting += children
        except OSError:  # it ended meanwhile
            pass
    return found


def _end(child: Child) -> tuple[int, float]:
    """Kill what is left; exit code (minus a signal) and processor time of the process itself."""
    _signal(child.pid)
    _, status, usage = os.wait4(child.pid, 0)
    kill_all()
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _status(code: int, too_long: bool, stderr: str) -> str:
    if too_long:
        return "output"
    if code == 0:
        return "ok"
    last = stderr.rstrip().rpartition("\n")[2]
    return "memory" if any(word in last or word in stderr[-300:] for word in DIAGNOSTICS) else "failed"


def _read(poll: select.poll, events: dict[int, int], fd: int, into: bytearray) -> None:
    if fd in events:
        piece = os.read(fd, 65536)
        into += piece
        if not piece:
            poll.unregister(fd)


def _drain(fd: int, into: bytearray, most: int) -> None:
    """Read what is left in a pipe."""
    try:
        while len(into) <= most and (piece := os.read(fd, 65536)):
            into += piece
    except BlockingIOError:  # somebody still has it open
        pass


def _signal(pid: int) -> None:
    try:
        os.kill(pid, SIGKILL)
    except OSError:
        pass


def _leave() -> NoReturn:
    kill_all()
    os._exit(0)
