"""Answers that reasoning-gym's own scorers run or reward, and honest ones beside them."""

from pathlib import Path

import pytest

from megatron_r1.config import component
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.types import Question

EVALUATED = [
    "binary_matrix",
    "n_queens",
    "spiral_matrix",
    "string_insertion",
    "puzzle24",
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "simple_integration",
]
GUARDED = [*EVALUATED, "coin_flip", "complex_arithmetic", "game_of_life_halting"]
UNSOLVED = "Integral("
"""In references that intermediate_integration itself could not find."""

CONSTANTS = ["", " ", "0", "1", "-1", "nan", "inf", "1e999", "True", "no idea", "()", "[]", "{}", "[" * 500, "24", "x"]


@pytest.fixture(autouse=True)
def _fixed_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # which polynomial_multiplication insists on


def build(dataset: str) -> Task:
    task = component.build("task", {"type": "reasoning_gym", "dataset": dataset})
    assert isinstance(task, Task)
    return task


def score(task: Task, problem: Problem, answer: str) -> float:
    asked = Question("0", "reasoning_gym", problem.text, problem.answer, problem.metadata)
    return task.verify(asked, answer)


@pytest.mark.parametrize("dataset", GUARDED)
def test_honest_answers_score_one(dataset: str) -> None:
    task = build(dataset)
    problems = [task.problem(4, index) for index in range(20)]
    assert all(score(task, problem, problem.answer) == 1.0 for problem in problems if UNSOLVED not in problem.answer)


@pytest.mark.parametrize("dataset", EVALUATED)
@pytest.mark.parametrize(
    "attack",
    [
        "__import__('pathlib').Path('{0}').touch()",
        "[__import__('pathlib').Path('{0}').touch() for _ in '1']",
        "(lambda: __import__('pathlib').Path('{0}').touch())()",
        'exec(\'open("{0}", "w")\')',
        "open('{0}', 'w')",
        "24 + 0*bool(open('{0}', 'w'))",
        "x.__class__.__init__.__globals__['__builtins__']['open']('{0}', 'w')",
    ],
)
def test_no_answer_is_run(dataset: str, attack: str, tmp_path: Path) -> None:
    task = build(dataset)
    problem = task.problem(4, 0)
    mark = tmp_path / "ran"
    assert score(task, problem, attack.replace("{0}", str(mark))) < 0.5
    assert not mark.exists()


@pytest.mark.parametrize("dataset", GUARDED)
def test_no_constant_is_right_more_often_than_the_truth(dataset: str) -> None:
    task = build(dataset)
    for problem in (task.problem(4, index) for index in range(5)):
        for answer in CONSTANTS:
            if score(task, problem, answer) == 1.0:
                assert answer.lower() == problem.answer.lower()


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("4*(2*7 - 8)", True),
        ("(7*2-8)*4", True),
        ("-(8 - 2*7)*4", True),
        ("6*4*1*1", False),
        ("8*4 - 7 - 2", False),
        ("4*(2*7 - 8) + 0", False),
        ("4*(2*7 - 8)*2/2", False),
        ("8*(7 - 4) / 2 * 2", False),
        ("2**4 + 8 * 7 / 7", False),
        ("24", False),
        ("int('24')", False),
        ("4*(2*7 - 8) if 1 else 2", False),
        ("4.0*(2*7 - 8)", False),
        ("True", False),
    ],
)
def test_the_24_game_uses_its_own_numbers_once(answer: str, right: bool) -> None:
    problem = Problem("", "", {"entry": {"answer": "4*(2*7 - 8)", "metadata": {"numbers": [2, 7, 8, 4]}}})
    assert score(build("puzzle24"), problem, answer) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [("0.375", True), ("3/8", True), (".37501", True), ("0", False), ("0.3", False), ("0.37", False), ("6/0", False)],
)
def test_a_probability_is_no_prefix(answer: str, right: bool) -> None:
    entry = {"answer": "0.375", "metadata": {"rational": {"numerator": 3, "denominator": 8}}}
    assert score(build("coin_flip"), Problem("", "", {"entry": entry}), answer) == right


def test_a_small_probability_is_not_zero() -> None:
    entry = {"answer": "6.103515625e-05", "metadata": {"rational": {"numerator": 1, "denominator": 16384}}}
    problem = Problem("", "", {"entry": entry})
    honest = ["6.103515625e-05", "1/16384", "0.000061"]
    assert [score(build("coin_flip"), problem, answer) for answer in [*honest, "0", "0.0001"]] == [1, 1, 1, 0, 0]


def test_an_antiderivative_is_not_the_question() -> None:
    metadata = {"integrand": "-2*(4*x - 10)**3", "variable": "x"}
    problem = Problem(
        "", "", {"entry": {"answer": "-32*x**4 + 320*x**3 - 1200*x**2 + 2000*x + C", "metadata": metadata}}
    )
    task = build("intermediate_integration")
    assert score(task, problem, "C - (4*x - 10)**4/8") == 1.0
    assert score(task, problem, "Integral(-2*(4*x - 10)**3, x)") == 0.0
    assert score(task, problem, "integrate(-2*(4*x - 10)**3, x)") == 0.0
