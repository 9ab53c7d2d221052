"""Runs programs in boxes on this machine."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward.sandbox.box import Box, Stopped
from megatron_r1.reward.sandbox.bubblewrap import Bubblewrap, explanation
from megatron_r1.reward.sandbox.checks import Checks
from megatron_r1.reward.sandbox.inside.programs import COMPILER_LIMITS
from megatron_r1.reward.sandbox.job import Program, Run, Status
from megatron_r1.reward.sandbox.pool import Pool
from megatron_r1.reward.sandbox.rlimits import ResourceLimits

Kind = Literal["bubblewrap", "rlimits"]
GRACE = 2.0
"""Seconds that a box gets beyond a limit that it keeps itself."""


def open_pool(kind: Kind, warm: int | None = None, limits: Limits | None = None) -> Pool:
    """Start a pool of boxes, and see that one works.

    Args:
        kind: how they are confined.
        warm: boxes that wait for work; None is one a core.
        limits: those of most jobs.

    Raises:
        EngineError: boxes of this kind do not start on this machine, and what to do about it.
    """
    limits = limits or Limits()
    launcher = Bubblewrap() if kind == "bubblewrap" else ResourceLimits()
    pool = Pool(launcher, warm or len(os.sched_getaffinity(0)), limits.tmp_mib)
    try:
        with pool.take(limits):
            return pool
    except EngineError as error:
        pool.close()
        raise EngineError(f"{error}{explanation(str(error)) if 'bwrap: ' in str(error) else ''}") from None


class Local:
    """Runs programs and checks in boxes of a pool. Safe to use from several threads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._checks = Checks(pool)

    def run(self, program: Program, inputs: Sequence[str], limits: Limits) -> Iterator[Run]:
        done = 0
        while done < len(inputs):
            for run in self._one_box(program, inputs[done:], limits):
                done += 1
                yield run

    def check(self, program: Program, prelude: str, checks: Sequence[str], limits: Limits) -> Iterator[Run]:
        return self._checks(program, prelude, checks, limits)

    def close(self) -> None:
        self._pool.close()

    def _one_box(self, program: Program, inputs: Sequence[str], limits: Limits) -> Iterator[Run]:
        """Runs until the box is dead, or no longer as it was; at least one."""
        with self._pool.take(limits) as box:
            try:
                loaded = self._load(box, program, limits)
            except Stopped as stopped:
                loaded = {"status": "compile_error", "stderr": str(stopped)}
            if loaded["status"] != "ok":
                yield from [Run("compile_error", stderr=str(loaded.get("stderr", "")))] * len(inputs)
                return
            for text in inputs:
                started = time.monotonic()
                try:
                    reply = self._ask(box, {"do": "run", "text": text}, limits.wall_seconds, limits)
                except Stopped as stopped:
                    yield Run(stopped.status, stderr=str(stopped), seconds=time.monotonic() - started)
                    return
                yield _run(reply, time.monotonic() - started)
                if reply.get("fresh") is not True:
                    return

    def _load(self, box: Box, program: Program, limits: Limits) -> dict[str, Any]:
        command = {"do": "load", "language": program.language, "source": program.source, "limits": limits.model_dump()}
        if program.language == "cpp":
            box.limit(limits.model_copy(update=COMPILER_LIMITS))
        reply = self._ask(box, command, limits.compile_seconds, limits)
        box.limit(limits)
        if reply["status"] == "no_compiler":
            raise ConfigError(
                "a program in C++ needs g++ in /usr/bin; install it (apt-get install g++), or leave C++ out"
            )
        return reply

    def _ask(self, box: Box, command: dict[str, Any], seconds: float, limits: Limits) -> dict[str, Any]:
        box.send(command)
        # Six characters of JSON are the most that one byte takes.
        return box.receive(time.monotonic() + seconds + GRACE, 6 * (limits.output_kib << 10) + (1 << 16))


def _run(reply: dict[str, Any], seconds: float) -> Run:
    """What a box says; a program can at most have forged its own."""
    match reply:
        case {"status": str(status), "stdout": str(stdout), "stderr": str(stderr)}:
            if status in get_args(Status):
                return Run(status, stdout, stderr, seconds)  # type: ignore[arg-type]
    return Run("failed", stderr="the box gave a wrong reply", seconds=seconds)
