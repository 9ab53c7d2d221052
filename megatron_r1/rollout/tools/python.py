"""A Python interpreter as a tool: programs that the model writes run in the sandbox."""

from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.choice import SandboxSection, open_executor
from megatron_r1.reward.sandbox.job import Executor, Program, Run
from megatron_r1.rollout.tools.base import Tool
from megatron_r1.types import Question

_ERROR_CHARACTERS = 1000
"""Of the end of what a failed program wrote on standard error."""


class Python(Tool):
    """Runs each call as a program of its own; the output is what it prints, and the end of its traceback if it fails.

    Calls are written as ToRL (arXiv 2503.23383) and Qwen2.5-Math (arXiv 2409.12122) write them: a fenced block of
    Python, its output in a fenced block behind it. Nothing is kept between two calls.
    """

    class Config(Tool.Config, SandboxSection):
        """[conversation.tools.<name>] with type = "python": the sandbox's keys (docs/sandbox.md) and these."""

        begin: str = "```python"
        end: str = "```"
        result: str = "\n```output\n{output}\n```\n"

    def __init__(self, config: Config) -> None:
        self.config: Python.Config = config
        self._executor: Executor | None = None

    def run(self, call: str, question: Question) -> str:
        """What the program prints."""
        limits = self.config.limits
        if self._executor is None:
            raise EngineError("the sandbox has been closed")
        [run] = self._executor.run(Program("python", call), [""], limits)
        return _told(run, limits.wall_seconds)

    def prepare(self) -> None:
        """Start the sandbox, or reach it, and have it run something.

        Raises:
            ConfigError: a token is missing.
            EngineError: the sandbox does not work here, is out of reach, or does not run Python.
        """
        self._executor = open_executor(self.config)
        [run] = self._executor.run(Program("python", "print(6 * 7)"), [""], self.config.limits)
        if run.stdout.strip() != "42":
            raise EngineError(
                f"sandbox = {self.config.sandbox!r} does not run Python: a program that prints 42 ended as "
                f"{run.status!r} and printed {run.stdout[:200]!r} {run.stderr[-200:]!r}"
            )

    def close(self) -> None:
        """End the sandbox."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None


def _told(run: Run, seconds: float) -> str:
    """A run as the model reads it."""
    reasons = {
        "ok": "",
        "failed": run.stderr.strip()[-_ERROR_CHARACTERS:] or "error: the program failed",
        "compile_error": run.stderr.strip()[-_ERROR_CHARACTERS:] or "error: this is no Python",
        "timeout": f"error: the program did not end within {seconds:g} s",
        "memory": "error: the program needs too much memory",
        "output": "error: the program prints too much",
    }
    return "\n".join(filter(None, (run.stdout.rstrip(), reasons[run.status]))) or "(nothing was printed)"
