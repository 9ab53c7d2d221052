"""`megatron-r1 evaluate`: pass@1, pass@k, majority vote, lengths of a model on tasks."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.config import component
from megatron_r1.config.evaluation import BenchmarkSection, EvaluateConfig
from megatron_r1.data.files import aside, write_json
from megatron_r1.data.questions import heldout, question
from megatron_r1.data.tasks.base import Task
from megatron_r1.errors import ConfigError
from megatron_r1.evaluate.comparison import gain, pass_rates
from megatron_r1.evaluate.estimators import interval, majority, pass_at_k, pass_rate, standard_error
from megatron_r1.rollout.answers import Answer
from megatron_r1.rollout.sampling import OpenEngine, Sampler, check_judged, open_fleet
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

Answered = list[tuple[Question, list[Answer]]]


def run(config: EvaluateConfig, open_engine: OpenEngine = open_fleet) -> dict[str, Any]:
    """Write `results.json` and `samples.jsonl`; killed and started again, go on after the last whole batch.

    Returns:
        The model, and the figures of each task (see `figures`).

    Raises:
        ConfigError: a task without an end and without `questions`, or rewards that do not judge correctness.
        DataError: a model, tokenizer or data set that cannot be read.
        EngineError: the engines do not start or die.
    """
    questions = {name: benchmark_questions(name, section) for name, section in config.tasks.items()}
    for section in config.tasks.values():
        check_judged(section.rewards)
    earlier = pass_rates(config.compare_with) if config.compare_with else {}
    results: dict[str, dict[str, Any]] = {}
    with Sampler(config, config.output, open_engine) as sampler, aside(config.output / "samples.jsonl") as partial:
        for name, section in config.tasks.items():
            samples = section.samples or config.samples
            asked = questions[name]
            answered = list(sampler.answers(asked, len(asked), section.rewards, section.task, samples))
            results[name] = figures(answered, config.pass_at)
            if name in earlier:
                results[name] |= gain(earlier[name], _rates(answered))
            _append(partial, name, answered)
    summary = {
        "model": str(config.model.path),
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "max_tokens": config.rollout.max_tokens,
        "tasks": results,
    }
    write_json(config.output / "results.json", summary)
    _show(summary)
    return summary


def benchmark_questions(name: str, section: BenchmarkSection) -> list[Question]:
    """The first questions of a task, or all; no seed changes them."""
    task: Task = component.build("task", section.task)
    if task.size is None:
        if section.questions is None:
            raise ConfigError(f"tasks.{name}: {task.name!r} makes problems without end; say how many `questions`")
        return heldout(section.asked(), section.questions)
    wanted = task.size if section.questions is None else section.questions
    if wanted > task.size:
        raise ConfigError(f"tasks.{name}: {wanted} questions are asked for, but {task.name!r} has {task.size}")
    stream = stream_seed("heldout")
    return [question(section.asked(), task.name, f"{index}", task.problem(stream, index)) for index in range(wanted)]


def figures(answered: Answered, pass_at: Sequence[int] = (1,)) -> dict[str, Any]:
    """The figures of one task.

    `pass@1` is the mean over questions of the share of right answers, `pass@1_error` its standard error (that of
    drawing the questions), `pass@1_interval` its 95 % confidence interval; `pass@k` the unbiased estimate; `cons@n`
    that of the commonest answer, only where questions have a reference answer to compare with. Questions that no
    reward judges are counted and left out of these, and so are single answers to the others that a judge failed at;
    these have a vote all the same, but `cons@n` leaves a question out whose commonest answer was judged nowhere.
    """
    judged = [(asked, answers) for asked, answers in answered if pass_rate(answers) is not None]
    everything = [answer for _, answers in answered for answer in answers]
    rates = [rate for _, answers in judged if (rate := pass_rate(answers)) is not None]
    result: dict[str, Any] = {
        "questions": len(answered),
        "questions_not_judged": len(answered) - len(judged),
        "answers_not_judged": sum(answer.correct is None for _, answers in judged for answer in answers),
        "samples": len(everything) // len(answered),
        "pass@1": _mean(rates),
        "pass@1_error": standard_error(rates),
        "pass@1_interval": interval(rates),
    }
    for k in sorted(set(pass_at) - {1}):
        solved = [_pass_at(answers, k) for _, answers in judged]
        result |= {f"pass@{k}": _mean(solved), f"pass@{k}_interval": interval(solved)}
    compared = [answers for asked, answers in judged if asked.answer and "tests" not in asked.metadata]
    votes = [vote for answers in compared if (vote := majority(answers)) is not None]
    if votes:
        name = f"cons@{result['samples']}"
        result |= {name: _mean(votes), f"{name}_interval": interval(votes)}
    result["mean_tokens"] = statistics.fmean(answer.tokens for answer in everything)
    result["truncated_share"] = statistics.fmean(not answer.finished for answer in everything)
    result["rewards"] = _mean_rewards(everything)
    return result


def _rates(answered: Answered) -> dict[str, float]:
    return {asked.id: rate for asked, answers in answered if (rate := pass_rate(answers)) is not None}


def _pass_at(answers: Sequence[Answer], k: int) -> float:
    judged = [answer for answer in answers if answer.correct is not None]
    return pass_at_k(len(judged), sum(answer.correct is True for answer in judged), min(k, len(judged)))


def _mean_rewards(answers: Sequence[Answer]) -> dict[str, float | None]:
    """The mean of each reward over the answers that it applies to."""
    names = dict.fromkeys(name for answer in answers for name in answer.rewards)
    return {name: _mean([v for answer in answers if (v := answer.rewards.get(name)) is not None]) for name in names}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _append(path: Path, name: str, answered: Answered) -> None:
    """Add the questions of a task with all answers, one line a question."""
    with path.open("a", encoding="utf-8", errors="replace") as out:
        for row in _rows(name, answered):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rows(name: str, answered: Answered) -> Iterator[dict[str, Any]]:
    for asked, answers in answered:
        yield {
            "task": name,
            "question_id": asked.id,
            "prompt": asked.prompt,
            "question": asked.metadata.get("text"),
            "answer": asked.answer,
            "pass_rate": pass_rate(answers),
            "responses": [asdict(answer) for answer in answers],
        }


def _show(summary: dict[str, Any]) -> None:
    """The figures as a table on standard error, a row for each task."""
    rows = {name: _cells(result) for name, result in summary["tasks"].items()}
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    table = Table(
        title=f"{summary['model']} (shares in %, with 95 % intervals; rewards are means x 100)",
        title_justify="left",
        box=None,
        header_style="dim",
    )
    table.add_column("task")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *[cells.get(column, "") for column in columns])
    Console(stderr=True).print(table)


def _cells(result: dict[str, Any]) -> dict[str, str]:
    """A task's figures by the heading of their column."""
    cells = {"questions": f"{result['questions']:,}"}
    if result["questions_not_judged"]:
        cells["not judged"] = f"{result['questions_not_judged']:,}"
    if result["answers_not_judged"]:
        cells["answers not judged"] = f"{result['answers_not_judged']:,}"
    for name, value in result.items():
        if name.startswith(("pass@", "cons@")) and "_" not in name:
            cells[name] = _percent(value)
    cells["pass@1"] += _range(result["pass@1_interval"])
    if "pass@1_gain" in result:
        cells["gain"] = _percent(result["pass@1_gain"]) + _range(result["pass@1_gain_interval"])
    cells |= {"tokens": f"{result['mean_tokens']:,.0f}", "truncated": _percent(result["truncated_share"])}
    return cells | {name: _percent(value) for name, value in result["rewards"].items()}


def _range(bounds: Sequence[float] | None) -> str:
    return " ({:.0f}-{:.0f})".format(*(100 * bound for bound in bounds)) if bounds else ""


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
