"""Questions for training and for evaluation, as pure functions of seed and position: nothing to save or restore."""

from collections.abc import Iterable, Iterator
from itertools import count

from megatron_r1.config import component
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.tasks.base import PATIENCE, Problem, Task, dry
from megatron_r1.data.templates import render
from megatron_r1.registry import resolve
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question


class Questions:
    """The training questions of a run: one stream of problems, of which every step takes the next ones.

    So a task with a size is gone through once before any of its problems comes again.

    Args:
        section: task and template.
        seed: of the run; another seed draws other questions, or the same in another order.
        exclude: bare texts (`texts(...)`) that are never drawn: the held-out questions.

    Raises:
        ConfigError: every problem is excluded.
    """

    def __init__(self, section: TaskSection, seed: int, exclude: frozenset[str] = frozenset()) -> None:
        self.section = section
        self._task: Task = component.build("task", section.task)
        render(section.template or self._task.template, "")  # a wrong name is better found now
        self._problem = self._task.stream(stream_seed("train", seed), exclude)

    def take(self, step: int, n: int) -> list[Question]:
        """The `n` questions of rollout `step`, whatever was taken before: those from position `step * n` on.

        Raises:
            ConfigError: the task yields nothing but excluded questions.
        """
        return [
            question(self.section, self._task.name, str(index), self._problem(index))
            for index in range(step * n, (step + 1) * n)
        ]


def heldout(section: TaskSection, n: int) -> list[Question]:
    """The first `n` held-out questions, all different; no run's seed changes them.

    Raises:
        ConfigError: the task has fewer than `n` different questions.
    """
    task: Task = component.build("task", section.task)
    problems = distinct(task, stream_seed("heldout"), frozenset(), repeats=False)
    return [question(section, task.name, f"heldout-{index}", next(problems)) for index in range(n)]


def texts(questions: Iterable[Question]) -> frozenset[str]:
    """The bare texts of questions, without their templates, for `Questions(exclude=...)`."""
    return frozenset(question.metadata["text"] for question in questions)


def distinct(task: Task, seed: int, exclude: frozenset[str], repeats: bool) -> Iterator[Problem]:
    """The problems of one stream without the excluded texts, and without earlier ones unless `repeats`."""
    seen = set(exclude)
    rejected = 0
    for index in count():
        problem = task.problem(seed, index)
        if problem.text in seen:
            rejected += 1
            if rejected == PATIENCE:
                raise dry(task, len(seen))
            continue
        rejected = 0
        if not repeats:
            seen.add(problem.text)
        yield problem


def question(section: TaskSection, name: str, number: str, problem: Problem) -> Question:
    """`problem` in its template; metadata `text` is the bare text, `config` the own keys of the task that made it.

    The template is the problem's, else the section's, else that of the task that made it. The id is of the task's
    `name` and `number`, or of the name that the task has in a mixture.
    """
    made_by = problem.task or section.task
    template = problem.template or section.template or resolve("task", made_by["type"]).template
    return Question(
        id=f"{problem.metadata.get('member', name)}-{number}",
        task=made_by["type"],
        prompt=render(template, problem.text),
        answer=problem.answer,
        metadata={
            "config": {key: value for key, value in made_by.items() if key != "type"},
            **problem.metadata,
            "text": problem.text,
        },
        rewards=problem.rewards if problem.rewards is not None or section.rewards is None else tuple(section.rewards),
        tools=None if section.tools is None else tuple(section.tools),
    )
