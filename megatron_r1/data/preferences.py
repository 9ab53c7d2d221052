"""Preferences from JSONL files: pairs of responses, or responses with a label."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_r1.data.tables import JsonLines
from megatron_r1.errors import DataError, nearest
from megatron_r1.seeds import stream_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Two whole responses to one prompt."""

    prompt: str
    """Full text, template included."""
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Labelled:
    """A whole response with a verdict."""

    prompt: str
    response: str
    label: int
    """1 = good (safe), 0 = bad."""


def read_pairs(paths: Iterable[Path]) -> list[Pair]:
    """The rows of pair files, in order.

    Raises:
        DataError: unreadable or empty file, a column missing or empty in a row, a pair of the same response twice.
    """
    rows = []
    for row in _rows(paths, ("prompt", "chosen", "rejected")):
        pair = Pair(row.text("prompt"), row.text("chosen"), row.text("rejected"))
        if pair.chosen == pair.rejected:
            raise DataError(f"{row.place}: `chosen` and `rejected` are the same text, so there is nothing to prefer")
        rows.append(pair)
    return rows


def read_labels(paths: Iterable[Path]) -> list[Labelled]:
    """The rows of label files, in order.

    Raises:
        DataError: unreadable or empty file, a column missing or empty in a row, a label that is neither 0 nor 1, or
            only one of the two in all the files.
    """
    rows = []
    for row in _rows(paths, ("prompt", "response", "label")):
        label = row.values["label"]
        if label not in (0, 1):
            raise DataError(f"{row.place}: `label` is {label!r}; 1 (safe) or 0 (unsafe) was expected")
        rows.append(Labelled(row.text("prompt"), row.text("response"), int(label)))
    if len({row.label for row in rows}) == 1:
        raise DataError(f"every label is {rows[0].label}: both 1 (safe) and 0 (unsafe) are needed to tell them apart")
    return rows


def hold_out(rows: Sequence[T], prompt: Callable[[T], str], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Rows to train on and rows held out; all rows of one prompt are on the same side.

    Args:
        rows: any rows.
        prompt: a row's prompt.
        share: of the prompts, held out; 0 = none.
        seed: of the draw, which depends on nothing but it and the prompts.

    Raises:
        DataError: too few prompts for both sides to have one.
    """
    prompts = sorted({prompt(row) for row in rows}, key=lambda text: stream_seed("heldout", seed, text))
    count = round(share * len(prompts))
    if share and not 0 < count < len(prompts):
        raise DataError(
            f"heldout_share {share:g} of {len(prompts)} prompts is {count}: bring more prompts, or another share"
        )
    held = set(prompts[:count])
    return [row for row in rows if prompt(row) not in held], [row for row in rows if prompt(row) in held]


@dataclass(frozen=True)
class _Row:
    place: str
    values: dict[str, object]

    def text(self, column: str) -> str:
        value = self.values[column]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.place}: `{column}` is {value!r}; a text was expected")
        return value


def _rows(paths: Iterable[Path], columns: Sequence[str]) -> Iterable[_Row]:
    for path in paths:
        table = JsonLines(path)
        if not len(table):
            raise DataError(f"{path} is empty; one JSON object a line with {', '.join(columns)} was expected")
        for number in range(len(table)):
            values = table.row(number)
            for column in columns:
                if column not in values:
                    raise DataError(
                        f"{table.place(number)} has no `{column}`{nearest(column, values)}; it has {', '.join(values)}"
                    )
            yield _Row(table.place(number), values)
