"""What the models of a recipe wrote: the same questions answered by all of them, and the rollouts of its runs."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from megatron_r1.errors import DataError
from megatron_r1.report.journal import Row

QUESTIONS = 8
"""Questions shown side by side, of all tasks together."""
READ = 4096
"""Lines of an evaluation's answers that are looked at for them."""
ROLLOUTS = 150
"""Responses of each stage in the browser, evenly over its steps."""


class Evaluated(Protocol):
    """A model and the stage that evaluates it."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> str: ...


@dataclass(frozen=True)
class Comparison:
    """One question and the first answer of each model to it."""

    task: str
    question: str
    answer: str
    responses: list[tuple[str, Row]]
    """Model and response."""


@dataclass(frozen=True)
class Rollout:
    """One response of a run, as the browser shows it."""

    stage: str
    step: int
    tag: str
    task: str
    question: str
    answer: str
    text: str
    reward: float
    rewards: dict[str, float | None]
    tokens: int
    finished: bool
    pieces: list[str] | None
    """What each token adds to the text; None where the run kept none."""
    engine_logprobs: list[float | None] | None
    trainer_logprobs: list[float | None] | None


def compare(output: Path, models: Sequence[Evaluated]) -> list[Comparison]:
    """The first questions that all finished evaluations have, the tasks taking turns."""
    found = {model.name: _first_answers(output / model.stage / "samples.jsonl") for model in models}
    found = {name: answers for name, answers in found.items() if answers}
    if not found:
        return []
    shared = [key for key in next(iter(found.values())) if all(key in answers for answers in found.values())]
    tasks = list(dict.fromkeys(task for task, _ in shared))
    each = -(-QUESTIONS // max(len(tasks), 1))
    chosen = [key for task in tasks for key in islice((key for key in shared if key[0] == task), each)]
    return [_comparison(key, found) for key in chosen]


def _comparison(key: tuple[str, str], found: dict[str, dict[tuple[str, str], Row]]) -> Comparison:
    rows = {name: answers[key] for name, answers in found.items()}
    first = next(iter(rows.values()))
    return Comparison(
        task=key[0],
        question=str(first.get("question") or first["prompt"]),
        answer=str(first["answer"]),
        responses=[(name, row["responses"][0]) for name, row in rows.items()],
    )


def _first_answers(path: Path) -> dict[tuple[str, str], Row]:
    # One response of each, for all models are held at once, and each question may have dozens of long ones.
    rows = islice(_rows(path), READ)
    return {(row["task"], row["question_id"]): row | {"responses": row["responses"][:1]} for row in rows}


def rollouts(output: Path, stages: Sequence[str]) -> list[Rollout]:
    """Responses that the runs kept, at most `ROLLOUTS` of each stage."""
    found = []
    for stage in stages:
        found += _evenly(_responses(stage, _rows(output / stage / "samples.jsonl")))
    return found


def _evenly(every: Iterable[Rollout]) -> list[Rollout]:
    """At most `ROLLOUTS` of them, the first included; a long run kept more than memory holds."""
    kept: list[Rollout] = []
    stride = 1
    for number, rollout in enumerate(every):
        if number % stride == 0:
            kept.append(rollout)
        if len(kept) > 2 * ROLLOUTS:
            kept, stride = kept[::2], 2 * stride
    return kept[:: max(1, -(-len(kept) // ROLLOUTS))]


def _rows(path: Path) -> Iterator[Row]:
    """Rows of a journal one by one; none if there is no file, none of the line that a kill cut short."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith("\n"):
                yield _row(path, number, line)


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row: Row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON ({error}); remove that line and try again") from error
    return row


def _responses(stage: str, rows: Iterable[Row]) -> Iterator[Rollout]:
    for row in rows:
        for response in row["responses"]:
            yield Rollout(
                stage=stage,
                **{name: row[name] for name in ("step", "tag", "task")},
                question=str(row.get("question") or row["prompt"]),
                answer=str(row["answer"]),
                **{name: response[name] for name in ("text", "reward", "rewards", "tokens", "finished")},
                **{name: response.get(name) for name in ("pieces", "engine_logprobs", "trainer_logprobs")},
            )
