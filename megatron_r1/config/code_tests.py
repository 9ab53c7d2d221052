"""The tests of a code question, as `metadata["tests"]` holds them: written by tasks, read by rewards."""

import ast
from typing import Literal

from pydantic import Field, JsonValue, NonNegativeFloat, NonNegativeInt, field_validator, model_validator

from megatron_r1.config.section import Section

Language = Literal["python", "cpp"]


class StdinTest(Section):
    """A program reads `input` and has to print `output`."""

    input: str
    output: str


class CallTest(Section):
    """`function(*arguments)` has to give `expected`; a tuple counts as the list of its items."""

    function: str
    """An expression of what the program defines: `add`, `Solution().twoSum`."""
    arguments: list[JsonValue]
    expected: JsonValue

    @field_validator("function")
    @classmethod
    def _is_expression(cls, function: str) -> str:
        try:
            ast.parse(function, mode="eval")
        except SyntaxError as error:
            raise ValueError(f"not a Python expression: {error.msg}") from error
        return function


class Subtask(Section):
    """Points for a set of tests that have to pass together (as in the IOI)."""

    points: NonNegativeFloat
    tests: list[NonNegativeInt] = Field(min_length=1)
    """Numbers of tests: those of `stdin` first, then `calls`, then `asserts`."""


class CodeTests(Section):
    """All tests of one question."""

    language: Language = "python"
    stdin: list[StdinTest] = []
    calls: list[CallTest] = []
    asserts: list[str] = []
    """Python statements; each is a test."""
    prelude: str = ""
    """Source that the program and the tests are both given."""
    subtasks: list[Subtask] = []
    limits: dict[str, int | float] = {}
    """Overrides of the sandbox's limits."""

    @model_validator(mode="after")
    def _consistent(self) -> "CodeTests":
        if self.language != "python" and (self.calls or self.asserts):
            raise ValueError(f"calls and asserts are for Python; {self.language} programs are tested by stdin")
        for subtask in self.subtasks:
            if max(subtask.tests) >= self.count:
                raise ValueError(f"subtask with the tests {subtask.tests}; there are tests 0 to {self.count - 1}")
        return self

    @property
    def count(self) -> int:
        """How many tests there are."""
        return len(self.stdin) + len(self.calls) + len(self.asserts)
