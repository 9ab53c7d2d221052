"""Checks of a program: two boxes, and every question and answer between them carried by hand.

The program's box (`inside/callee.py`) answers calls; the check's box (`inside/caller.py`) judges, and never executes
anything of the program's. Only the check's box says how a check ended, and the program cannot reach it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError
from megatron_r1.reward.sandbox.box import Box, Stopped
from megatron_r1.reward.sandbox.job import Program, Run, Status
from megatron_r1.reward.sandbox.pool import Pool

MAX_QUESTION = 16 << 20
"""Bytes of one call with its arguments."""
MAX_ANSWER = 4 << 20
"""Bytes of one answer, which as Python's objects may take twenty times that here."""

TRUSTED = Limits(memory_mib=4096)
"""Of a box that judges; the checks in it keep to their own limits."""
END_SECONDS = 10.0


class Checks:
    """`Executor.check` with the boxes of a pool. Safe to use from several threads.

    A program gets a box of its own. Boxes that judge are trusted, fork a process for each program, and serve again.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._idle: list[_Caller] = []

    def __call__(self, program: Program, prelude: str, checks: Sequence[str], limits: Limits) -> Iterator[Run]:
        """One run for each check.

        All checks meet the same process of the program, as long as it lives. One that kills it or runs past the time
        limit fails, and the next meets a fresh one. Its processor time is limited for all checks together.

        Raises:
            ConfigError: the program is not Python.
            EngineError: no box starts.
        """
        if program.language != "python":
            raise ConfigError(f"checks call Python functions, and this program is written in {program.language}")
        done = 0
        while done < len(checks):
            start = time.monotonic()
            try:
                for run in self._together(program, prelude, checks[done:], limits):
                    done += 1
                    yield run
                    start = time.monotonic()
            except Stopped as stopped:
                done += 1
                yield Run(stopped.status, stderr=str(stopped), seconds=time.monotonic() - start)

    def _together(self, program: Program, prelude: str, checks: Sequence[str], limits: Limits) -> Iterator[Run]:
        """Checks of one process of the program; Stopped when it, or the box that judges, dies."""
        budget = {**limits.model_dump(), "cpu_seconds": limits.cpu_seconds * len(checks)}
        with self._pool.take(limits) as callee:
            loaded = _load(callee, program, prelude, limits.wall_seconds, budget)
            if loaded.status != "ok":
                yield from [loaded] * len(checks)
                return
            caller = self._caller()
            try:
                caller.begin(prelude, budget)
                for source in checks:
                    yield caller.check(callee, source, limits.wall_seconds)
            finally:
                if caller.end():
                    self._idle.append(caller)

    def _caller(self) -> "_Caller":
        try:
            return self._idle.pop()
        except IndexError:
            return _Caller(self._pool)


class _Caller:
    """A box that judges: the checks of one program, then those of another."""

    def __init__(self, pool: Pool) -> None:
        self._stack = ExitStack()
        self._box = self._stack.enter_context(pool.take(TRUSTED))
        self._between = True
        """Not inside a check: where one was given up, the box is of no use any more."""

    def begin(self, prelude: str, limits: dict[str, Any]) -> None:
        """Have it fork a process, which keeps to these limits for all checks together."""
        self._box.send({"do": "judge", "prelude": prelude, "limits": limits})

    def check(self, callee: Box, source: str, seconds: float) -> Run:
        """Pass questions and answers until the check has ended; Stopped when a process ends before it."""
        self._between = False
        start = time.monotonic()
        self._box.send({"source": source})
        while "status" not in (reply := self._box.receive(start + seconds, MAX_QUESTION, callee)):
            if "ended" in reply:
                raise Stopped("failed", "the process of the check died")
            callee.send(reply["ask"])
            self._answer(callee.receive(start + seconds, MAX_ANSWER))
        self._between = True
        return Run("ok" if reply["status"] == "ok" else "failed", "", reply["stderr"], time.monotonic() - start)

    def end(self) -> bool:
        """Have the forked process end, or kill the box; whether it can begin again."""
        if self._between:
            with suppress(Stopped):
                self._box.send({})
                if "ended" in self._box.receive(time.monotonic() + END_SECONDS):
                    return True
        self._stack.close()
        return False

    def _answer(self, answer: dict[str, Any]) -> None:
        try:
            self._box.send({"answer": answer})
        except (RecursionError, ValueError):  # what can be read need not be what can be sent
            raise Stopped("failed", "an answer is nested too deep") from None


def _load(callee: Box, program: Program, prelude: str, seconds: float, limits: dict[str, Any]) -> Run:
    """Have the program executed in its box, which then answers."""
    start = time.monotonic()
    try:
        callee.send({"do": "answer", "prelude": prelude, "source": program.source, "limits": limits})
        reply = callee.receive(start + seconds)
    except Stopped as stopped:
        return Run(stopped.status, "", str(stopped), time.monotonic() - start)
    status: Status = "ok" if reply.get("status") == "ok" else "failed"
    stderr = reply.get("stderr")
    return Run(status, "", stderr if isinstance(stderr, str) else "", time.monotonic() - start)
