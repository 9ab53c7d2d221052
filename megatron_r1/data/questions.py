"""Questions for training and for evaluation, as pure functions of seed and step: nothing to save or restore."""

from collections.abc import Iterable, Iterator
from itertools import count

from megatron_r1.config import component
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.templates import render
from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

_PATIENCE = 1000
"""Rejected problems in a row after which a task counts as exhausted."""


class Questions:
    """The training questions of a run.

    Args:
        section: task and template.
        seed: of the run; another seed draws other questions.
        exclude: bare texts (`texts(...)`) that are never drawn: the held-out questions.
    """

    def __init__(self, section: TaskSection, seed: int, exclude: frozenset[str] = frozenset()) -> None:
        self.section = section
        self.seed = seed
        self.exclude = exclude
        self._task: Task = component.build("task", section.task)

    def take(self, step: int, n: int) -> list[Question]:
        """The `n` questions of rollout `step`, whatever was taken before.

        Raises:
            ConfigError: the task yields nothing but excluded questions.
        """
        stream = stream_seed("train", self.seed, step)
        problems = distinct(self._task, stream, self.exclude, repeats=True)
        return [question(self.section, self._task.name, f"{step}-{index}", next(problems)) for index in range(n)]


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
            if rejected == _PATIENCE:
                raise ConfigError(
                    f"task {task.name!r} ran dry: its last {_PATIENCE} questions were all held out or seen before "
                    f"({len(seen):,} texts are taken); ask for fewer questions or widen the task's options"
                )
            continue
        rejected = 0
        if not repeats:
            seen.add(problem.text)
        yield problem


def question(section: TaskSection, name: str, number: str, problem: Problem) -> Question:
    """`problem` in the section's template; metadata `text` is the bare text, `config` the task's own keys."""
    own = {key: value for key, value in section.task.items() if key != "type"}
    return Question(
        id=f"{name}-{number}",
        task=section.task["type"],
        prompt=render(section.template, problem.text),
        answer=problem.answer,
        metadata={"config": own, **problem.metadata, "text": problem.text},
    )
