"""Programming problems with tests."""

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt

from megatron_r1.config.records import RecordsSection
from megatron_r1.config.section import Component
from megatron_r1.data.records import Row
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.code_tests import code_tests
from megatron_r1.data.tasks.records import RecordsTask
from megatron_r1.errors import DataError

_TESTS = ("tests", "input_output", "verification_info", "test_list", "official_tests")
"""Fields that may hold the tests; the first that does is taken."""


class Code(RecordsTask):
    """Problems with tests in one of the shapes of `code_tests`.

    The prompt adds to the problem what a solution has to be called by: the starter code, or the function's name, or the
    first of the tests that are Python statements.
    """

    class Config(RecordsSection):
        language: Literal["python", "cpp"] | None = None
        """Language of the solutions, where the tests do not say; None = Python."""
        shown_asserts: NonNegativeInt = 1
        """How many tests that are Python statements the prompt shows."""

    required: ClassVar[tuple[str, ...]] = ("problem",)
    optional: ClassVar[tuple[str, ...]] = (
        *(*_TESTS, "starter_code", "prelude", "test_imports", "test_setup_code"),
        *("time_limit", "memory_limit"),
    )
    template: ClassVar[str] = "r1_zero_code"
    default_rewards: ClassVar[dict[str, Component]] = {"code": {"type": "code"}, "format": {"type": "format"}}

    def parse(self, row: Row) -> Problem:
        held = (row.get(field) for field in _TESTS)
        value = next((value for value in held if value not in (None, "", [], {})), None)
        if value is None:
            raise DataError(
                f"{row.place}: no tests in any of {', '.join(_TESTS)}; the columns are {', '.join(row.values)}"
            )
        tests = code_tests(row, value, self.config.language)
        return Problem(self._text(row, tests), answer="", metadata={"tests": tests})

    def _text(self, row: Row, tests: dict[str, Any]) -> str:
        problem, starter = row.text("problem").strip(), row.get("starter_code")
        if isinstance(starter, str) and starter.strip():
            return f"{problem}\n\nComplete this code:\n\n```{tests['language']}\n{starter.rstrip()}\n```"
        functions = sorted({call["function"] for call in tests.get("calls", [])})
        if functions:
            return f"{problem}\n\nTests call {' and '.join(f'`{name}`' for name in functions)}."
        shown = tests.get("asserts", [])[: self.config.shown_asserts]
        return "\n".join([problem, "", *shown]) if shown else problem
