"""What a source asks its model: different questions of a task, none of them held out, with examples before them."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from megatron_r1.config import component
from megatron_r1.config.collect import CollectConfig, ExamplesSection, ExcludedSection, SampleSource
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.overlap import bare
from megatron_r1.data.questions import distinct, heldout, question, texts
from megatron_r1.data.records import Records
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.templates import render
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.registry import resolve
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

STOP = "stop"
"""In the metadata of a question: texts that a response ends before."""


@dataclass(frozen=True)
class Asked:
    """A question as its model is asked, and the prompt that its rows are stored with."""

    question: Question
    prompt: str
    examples: list[int]
    """Numbers of the examples before it."""


def excluded(sections: Mapping[str, ExcludedSection]) -> frozenset[str]:
    """Bare texts of the questions that are held out."""
    held = [texts(heldout(TaskSection(task=section.task), section.questions)) for section in sections.values()]
    return frozenset[str]().union(*held)


def asked(config: CollectConfig, name: str, section: SampleSource, taken: frozenset[str]) -> list[Asked]:
    """The questions of a source, a function of the run's seed and the source's name.

    Raises:
        ConfigError: a task without an end and without `questions`, or with fewer than these; an unknown template.
        DataError: a data set, or examples, that cannot be read.
    """
    seed = stream_seed("collect", config.seed, name)
    found = different(f"sources.{name}", section.data, section.questions, seed, taken)
    if section.stop:
        found = [replace(one, metadata={**one.metadata, STOP: section.stop}) for one in found]
    shown = _examples(section.examples, _template(section), seed) if section.examples else _none
    template = section.prompt_template
    return [
        Asked(
            replace(one, prompt=prefix + one.prompt),
            render(template, one.metadata["text"]) if template else one.prompt,
            numbers,
        )
        for one in found
        for prefix, numbers in [shown(one)]
    ]


def different(where: str, data: TaskSection, wanted: int | None, seed: int, taken: frozenset[str]) -> list[Question]:
    """Different questions of a task, none of them taken.

    Args:
        where: section of the run file, for messages.
        data: task and template.
        wanted: how many; None = all that the task has.
        seed: of the stream that they are drawn from.
        taken: bare texts.

    Raises:
        ConfigError: a task without an end and no number, or with fewer than these.
    """
    task: Task = component.build("task", data.task)
    if task.size is None and wanted is None:
        raise ConfigError(f"{where}: {task.name!r} makes problems without end; say how many `questions`")
    problems = list(islice(_problems(task, seed, taken), wanted))
    if len(problems) < (wanted or 1):
        raise ConfigError(
            f"{where}: {wanted or 1} questions are asked for, but {task.name!r} has {len(problems)} different ones "
            "that are not excluded"
        )
    return [question(data, task.name, str(index), problem) for index, problem in enumerate(problems)]


def _problems(task: Task, seed: int, taken: frozenset[str]) -> Iterator[Problem]:
    if task.size is None:
        yield from distinct(task, seed, taken, repeats=False)
        return
    seen = set(taken)
    for problem in (task.problem(seed, index) for index in range(task.size)):
        if problem.text not in seen:
            seen.add(problem.text)
            yield problem


def _template(section: SampleSource) -> str:
    template: str = section.data.template or resolve("task", section.data.task["type"]).template
    return template


Shown = Callable[[Question], tuple[str, list[int]]]
"""A question -> the text before its prompt, and the numbers of the examples in it."""


def _none(one: Question) -> tuple[str, list[int]]:
    return "", []


def _examples(section: ExamplesSection, template: str, seed: int) -> Shown:
    """Draws examples for each question, never the question itself."""
    rows = Records(section)
    rows.require("question", "response")
    known = [(row.text("question"), row.text("response")) for row in rows]

    def shown(one: Question) -> tuple[str, list[int]]:
        same = bare(one.metadata["text"])
        others = [number for number, (text, _) in enumerate(known) if bare(text) != same]
        if len(others) < section.count:
            raise DataError(
                f"{section.source} has {len(others)} examples beside the question; {section.count} are asked"
            )
        numbers = random.Random(stream_seed("examples", seed, one.id)).sample(others, section.count)
        worked = [render(template, known[number][0]) + known[number][1] + section.separator for number in numbers]
        return "".join(worked), numbers

    return shown
