"""A box: processes without rights, a command in, a line of JSON out."""

import contextlib
import fcntl
import json
import marshal
import os
import select
import time
from subprocess import Popen
from typing import Any, Protocol

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.bundle import bundle
from megatron_r1.reward.sandbox.job import Status
from megatron_r1.reward.sandbox.watch import FREE_DESCRIPTORS, room, usage

START_SECONDS = 60.0
"""A box starts in some 20 ms; this is for a machine that is out of breath."""
TICK = 0.025
PIPE_BYTES = 1 << 18
"""Room for the bundle, so that whoever starts a box need not wait until it reads."""
SMALL_FILES = 16384
"""How many files the private folder may hold: each takes a kilobyte that no other limit counts."""
OPEN_FILES = 4
"""Times `Limits.files`: how many all processes together may have open. The buffer of a socket is nobody's memory."""


class Stopped(Exception):  # noqa: N818 - an outcome, not an error
    """The box is dead, because of what ran in it."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Jail(Protocol):
    """The processes of one box."""

    process: "Popen[bytes]"
    """What was started, with pipes for standard input, output and error."""

    def leader(self) -> int:
        """Id of the process that executes `bundle.BOOT`, above all others of the box."""
        ...

    def files(self) -> int:
        """How many files its private folder holds."""
        ...

    def end(self) -> None:
        """Kill all of its processes and wait for them; may be called more than once."""
        ...


class Box:
    """One started box. `Pool.take` gives it away once, and kills everything in it at the end."""

    def __init__(self, jail: Jail) -> None:
        """Take over processes that were just started; does not wait for them."""
        self._jail = jail
        self._limits = Limits()
        self._leader: int | None = None
        self._room = FREE_DESCRIPTORS
        self._watched = 0.0
        self._received = bytearray()
        self._commands, self._replies = _pipes(jail.process)
        self._write(bundle(), time.monotonic() + START_SECONDS)

    def begin(self, limits: Limits) -> None:
        """Wait until it answers; from now on these limits hold.

        Raises:
            EngineError: it did not start, with what it said.
        """
        try:
            self.receive(time.monotonic() + START_SECONDS)
            leader = self._jail.leader()
            if self._wait(self._replies, 0, 0):  # closed: it died after that
                self._stop("failed", "the box died")
        except (Stopped, EngineError) as error:
            raise EngineError(f"a sandbox did not start ({error}): {self._last_words()}") from None
        self._leader, self._room, self._watched = leader, room(leader), time.monotonic()
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        """From now on its processes together keep to these."""
        self._limits = limits

    def send(self, command: dict[str, Any]) -> None:
        """Give a command: `do` names one of `inside.main.COMMANDS`, the other keys are its arguments.

        Raises:
            Stopped: the box died, or does not read.
        """
        data = marshal.dumps(command)
        self._write(len(data).to_bytes(4, "big") + data, time.monotonic() + self._limits.wall_seconds)

    def receive(self, deadline: float, most: int = 1 << 20, beside: "Box | None" = None) -> dict[str, Any]:
        """The next reply. Nothing in it can be trusted: a program may have written it.

        Args:
            deadline: by `time.monotonic()`.
            most: length of the reply in bytes.
            beside: another box, which is watched meanwhile: what runs there need not wait.

        Raises:
            Stopped: the box is dead: no reply in time, one too long or not JSON, or more of a limit than all its
                processes may have.
        """
        searched = 0
        while True:
            for box in filter(None, (self, beside)):
                box.watch()
            if (end := self._received.find(b"\n", searched)) >= 0:
                break
            searched = len(self._received)
            now = time.monotonic()
            if searched > most:
                self._stop("output", f"a reply of more than {most} bytes")
            if now >= deadline:
                self._stop("timeout", "no reply in time")
            if self._wait(self._replies, select.POLLIN, min(TICK, deadline - now)):
                piece = os.read(self._replies, 1 << 20)
                if not piece:
                    self._stop("failed", "the box died")
                self._received += piece
        if end > most:
            self._stop("output", f"a reply of more than {most} bytes")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return self._parse(line)

    def watch(self) -> None:
        """See that its processes together keep to the limits, once a `TICK`, however often it is called.

        Raises:
            Stopped: they did not; the box is dead.
        """
        if self._leader is None or time.monotonic() - self._watched < TICK:
            return
        used = usage(self._leader, 2 * self._limits.processes, self._room)
        if used.tasks - 1 > self._limits.processes:
            self._stop("failed", f"more than {self._limits.processes} processes and threads")
        if used.descriptors > OPEN_FILES * self._limits.files:
            self._stop("failed", f"more than {OPEN_FILES * self._limits.files} open files")
        if used.memory_kib > self._limits.memory_mib << 10:
            self._stop("memory", f"more than {self._limits.memory_mib} MiB")
        if self._jail.files() > SMALL_FILES:
            self._stop("memory", f"more than {SMALL_FILES} files")
        self._watched = time.monotonic()

    def end(self) -> None:
        """Kill everything in it; from any thread, while another uses the box."""
        self._jail.end()

    def kill(self) -> None:
        """Kill everything in it and let go of it; may be called more than once."""
        self._jail.end()
        for pipe in (self._jail.process.stdin, self._jail.process.stdout, self._jail.process.stderr):
            if pipe is not None:
                pipe.close()

    def _write(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        try:
            while left:
                if self._wait(self._commands, select.POLLOUT, TICK):
                    left = left[os.write(self._commands, left) :]
                elif time.monotonic() >= deadline:
                    self._stop("timeout", "the box does not read")
                self.watch()
        except BrokenPipeError:
            if self._leader is not None:  # one that never started is asked what it died of
                self._stop("failed", "the box died")

    def _wait(self, fd: int, event: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(fd, event)
        return bool(poll.poll(seconds * 1000))

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            self._stop("failed", "a reply that is no JSON object")
        return reply

    def _stop(self, status: Status, reason: str) -> None:
        if self._leader is not None:
            self.kill()
        raise Stopped(status, reason)

    def _last_words(self) -> str:
        stderr = self._jail.process.stderr
        assert stderr is not None
        self._jail.end()
        os.set_blocking(stderr.fileno(), False)
        said = (stderr.read() or b"").decode(errors="replace").strip()
        self.kill()
        return said or f"exit code {self._jail.process.returncode}"


def _pipes(process: "Popen[bytes]") -> tuple[int, int]:
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    with contextlib.suppress(PermissionError):  # the user has all the pipes that one may have: a program in a box can
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process.stdin.fileno(), process.stdout.fileno()
