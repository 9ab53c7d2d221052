"""What is asked of a sandbox and what it answers; every executor speaks this."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_r1.config.code_tests import Language
from megatron_r1.config.sandbox import Limits

Status = Literal["ok", "failed", "timeout", "memory", "output", "compile_error"]
"""`failed`: a non-zero exit, a signal, or an assertion that does not hold. `memory`, `output`: over that limit."""


@dataclass(frozen=True)
class Program:
    """Source code that nobody trusts."""

    language: Language
    source: str


@dataclass(frozen=True)
class Run:
    """How one run, or one check, of a program ended."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    """The end of what it wrote there, for people to read."""
    seconds: float = 0.0
    """Wall time."""


class Executor(Protocol):
    """Runs programs where they can do no harm, and where they cannot see what they are judged by.

    Runs are given one after the other, as they end: who stops asking has the rest not done.
    """

    def run(self, program: Program, inputs: Sequence[str], limits: Limits) -> Iterable[Run]:
        """One run for each text of standard input, each in a fresh process; expected outputs never get near it.

        Raises:
            EngineError: the executor itself does not work. What the program does is never an error.
        """
        ...

    def check(self, program: Program, prelude: str, checks: Sequence[str], limits: Limits) -> Iterable[Run]:
        """One run for each check: Python statements that call what the program defines and may assert.

        Checks run in a process of their own. They reach the program's functions and classes by name through calls that
        carry plain values (numbers, text, lists, dicts ...), so the program cannot see, patch or leave them. Arguments
        arrive as copies, so a check does not see what the program changes in them; functions cannot be arguments;
        objects of the program's own classes can be used, but not compared. Any name that neither `prelude` nor a check
        defines is the program's, so what a check compares with has to be in one of these (but for the modules of the
        standard library).

        Args:
            program: Python source; it is executed once and then answers calls.
            prelude: trusted source that is executed before both, such as imports and given functions.
            checks: trusted sources.
            limits: of the program; the wall time is that of one check.

        Raises:
            ConfigError: this executor cannot run checks.
            EngineError: the executor itself does not work.
        """
        ...

    def close(self) -> None:
        """End every process; may be called more than once."""
        ...
