"""What every task keeps to; `--component` runs this on yours."""

import json
from typing import Any

from megatron_r1.config import component
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import question as as_question
from megatron_r1.data.tasks.base import Task
from megatron_r1.data.templates import render
from megatron_r1.registry import BUILT_IN
from tests.contracts.built_in import TASKS
from tests.contracts.conftest import refuses_unknown_keys

INDICES = (0, 1, 2, 7, 1500)


def test_every_built_in_is_held_to_the_contract() -> None:
    assert {part["type"] for part in TASKS} == set(BUILT_IN["task"])


def test_unknown_keys_are_refused(task_section: dict[str, Any]) -> None:
    assert refuses_unknown_keys("task", task_section)


def test_problems_repeat_in_any_order_and_in_any_process(task_section: dict[str, Any], task: Task) -> None:
    forwards = [task.problem(3, index) for index in INDICES]
    other: Task = component.build("task", task_section)
    assert [other.problem(3, index) for index in reversed(INDICES)] == forwards[::-1]


def test_another_seed_gives_other_problems(task: Task) -> None:
    count = task.size or 50
    streams = [[task.problem(seed, index).text for index in range(count)] for seed in (0, 1)]
    assert streams[0] != streams[1]
    if task.size:
        assert sorted(streams[0]) == sorted(streams[1]), "each problem once before any a second time"


def test_problems_are_whole(task: Task) -> None:
    for index in INDICES:
        problem = task.problem(0, index)
        assert problem.text.strip()
        assert render(task.template, problem.text).count(problem.text) == 1
        assert json.loads(json.dumps(problem.metadata)) == problem.metadata


def test_default_rewards_can_be_built(task: Task) -> None:
    for section in task.default_rewards.values():
        component.build("reward", component.complete("reward", section))


def test_its_verifier_takes_its_own_answers_and_not_just_any(task_section: dict[str, Any], task: Task) -> None:
    """A question alone rebuilds what verifies it; only questions of a task without a verifier have none."""
    section = TaskSection(task=component.complete("task", task_section))
    for index in INDICES:
        problem = task.problem(0, index)
        asked = as_question(section, task.name, str(index), problem)
        verifier: Task = component.build("task", {**asked.metadata["config"], "type": asked.task})
        if type(verifier).verify is Task.verify:
            assert "task" not in (problem.rewards or task.default_rewards)
            continue
        if problem.answer:
            assert verifier.verify(asked, problem.answer) == 1.0
        assert verifier.verify(asked, "no idea at all") < 1.0
