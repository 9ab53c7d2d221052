import random
import re
from collections.abc import Iterator

import pytest

from megatron_r1.config import component
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.worked import styles
from megatron_r1.errors import ConfigError
from tests.data.small_corpus import STYLES, TASK

FORM = re.compile(r" <think>[^<]+</think> <answer>(-?\d+)</answer>")


def problems(**options: int) -> Iterator[Problem]:
    task = component.build("task", {**TASK, "options": options or TASK["options"]})
    return (task.problem(5, index) for index in range(200))


def wrong_steps(solution: str) -> list[str]:
    """The equations of a solution that do not hold, by Python's arithmetic."""
    return [step for step in re.findall(r"-?\d+[+-]-?\d+=-?\d+", solution) if not eval(step.replace("=", "=="))]


def solve(style: str, problem: Problem, seed: int = 0) -> str:
    return styles("chain_sum")[style](problem, random.Random(seed))


def test_careful_is_right_in_every_step() -> None:
    for problem in problems():
        solution = solve("careful", problem)
        match = FORM.fullmatch(solution)
        assert match
        assert match[1] == problem.answer
        assert not wrong_steps(solution)
        assert solution.count("=") == problem.metadata["entry"]["metadata"]["num_terms"] - 1


def test_checked_corrects_exactly_one_wrong_step() -> None:
    for problem in problems():
        solution = solve("checked", problem)
        match = FORM.fullmatch(solution)
        assert match
        assert match[1] == problem.answer
        assert len(wrong_steps(solution)) == 1
        assert solution.count("wait, check: ") == 1


def test_slip_has_one_wrong_step_and_a_wrong_answer() -> None:
    for problem in problems():
        solution = solve("slip", problem)
        match = FORM.fullmatch(solution)
        assert match
        assert match[1] != problem.answer
        assert len(wrong_steps(solution)) == 1


def test_guess_shows_no_working_and_is_seldom_right() -> None:
    answers = []
    for number, problem in enumerate(problems()):
        match = FORM.fullmatch(solve("guess", problem, seed=number))
        assert match
        answers.append(match[1] == problem.answer)
    assert 0 < sum(answers) < 60


def test_bare_is_right_without_tags() -> None:
    for problem in problems():
        solution = solve("bare", problem)
        assert "<" not in solution
        assert not wrong_steps(solution)
        assert solution.endswith(f" The answer is {problem.answer}.")


@pytest.mark.parametrize("style", STYLES)
def test_solutions_follow_the_generator_and_start_with_a_space(style: str) -> None:
    for problem in problems(min_terms=1, max_terms=3, min_digits=1, max_digits=3):
        solution = solve(style, problem, seed=9)
        assert solution == solve(style, problem, seed=9)
        assert solution[0] == " "
        assert solution[1] != " "


def test_a_task_without_solutions() -> None:
    with pytest.raises(ConfigError, match="no worked solutions for 'chain_sums', did you mean 'chain_sum'"):
        styles("chain_sums")
