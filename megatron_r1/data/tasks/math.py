"""Mathematics with a reference answer: a number, an expression, an equation, a set ..."""

import re
from typing import ClassVar

from megatron_r1.config.section import Component
from megatron_r1.data.records import Row
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.records import RecordsTask
from megatron_r1.errors import DataError

_MARK = "####"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""A brace, or what a backslash escapes."""


class Math(RecordsTask):
    r"""Problems with an `answer`, or with a worked `solution` that ends in one.

    In a worked solution, which the `answer` column may hold as well, the answer is the last `\boxed{...}` (MATH,
    NuminaMath) or what follows the last `####` (GSM8K).
    """

    required: ClassVar[tuple[str, ...]] = ("problem",)
    optional: ClassVar[tuple[str, ...]] = ("answer", "solution")
    default_rewards: ClassVar[dict[str, Component]] = {"accuracy": {"type": "accuracy"}, "format": {"type": "format"}}

    def parse(self, row: Row) -> Problem:
        return Problem(row.text("problem").strip(), _answer(row))


def _answer(row: Row) -> str:
    given = row.get("answer")
    if isinstance(given, int | float) and not isinstance(given, bool):
        return str(given)
    if isinstance(given, str) and given.strip():
        return final_answer(given) or given.strip()
    solution = row.get("solution")
    answer = final_answer(solution) if isinstance(solution, str) else None
    if answer is None:
        raise DataError(
            f"{row.place}: no answer, neither a column `answer` that holds one nor a `solution` that ends in "
            f"\\boxed{{...}} or {_MARK}; the columns are {', '.join(row.values)}"
        )
    return answer


def final_answer(solution: str) -> str | None:
    r"""What a worked solution ends in, or None: the last whole `\boxed{...}`, else what follows the last `####`."""
    found = None
    for piece in solution.split("\\boxed")[1:]:
        found = _braced(piece.lstrip()) or found
    if found is None and _MARK in solution:
        found = solution.rpartition(_MARK)[2].strip() or None
    return found


def _braced(text: str) -> str | None:
    r"""What stands in the braces that `text` begins with; an escaped brace such as `\{` is none."""
    depth = 0
    for sign in _BRACE.finditer(text) if text.startswith("{") else ():
        depth += {"{": 1, "}": -1}.get(sign[0], 0)
        if depth == 0:
            return text[1 : sign.start()].strip()
    return None
