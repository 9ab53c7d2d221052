"""`megatron-r1 data decontaminate`: drop the rows that share words with evaluation sets."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_r1.config import component
from megatron_r1.config.evaluation_set import EvaluationSetSection
from megatron_r1.config.records import RecordsSection
from megatron_r1.config.section import Section
from megatron_r1.data.files import write_json
from megatron_r1.data.overlap import Match, NgramIndex
from megatron_r1.data.records import Records, Row
from megatron_r1.data.sieve import Sieve
from megatron_r1.data.tasks.finite import FiniteTask
from megatron_r1.errors import ConfigError, DataError

COMMONEST = 20
"""N-grams that the summary names: one that drops hundreds of rows is a phrase that both sides were written with."""


class DecontaminateConfig(Section):
    """`megatron-r1 data decontaminate`: rows without word overlap with evaluation sets."""

    output: Path
    """Folder for `kept.jsonl`, `dropped.jsonl` (each row with what it shares) and `summary.json`."""
    data: RecordsSection
    text: list[str] = Field(default=["problem"], min_length=1)
    """Columns that are compared, each by itself; a row is dropped for any of them."""
    ngram: PositiveInt = 10
    """One run of this many words in common drops a row: 10 in DeepSeek-R1, 8 in open-r1 (`data/overlap.py` says what a
    word is). A shorter text has to be the same as a whole."""
    evaluation: dict[str, EvaluationSetSection] = Field(min_length=1)
    """Name -> evaluation set."""


def run(config: DecontaminateConfig) -> dict[str, Any]:
    """Write `kept.jsonl`, `dropped.jsonl` and `summary.json`; see `separate`.

    Raises:
        DataError: no row is kept.
    """
    summary = separate(config)
    if not summary["kept"]:
        raise DataError(
            f"all {summary['rows']:,} rows of {config.data.source} share words with an evaluation set; "
            f"{config.output / 'dropped.jsonl'} shows which: they are that set, or `ngram` = {config.ngram} is too few"
        )
    write_json(config.output / "summary.json", summary)
    return summary


def separate(config: DecontaminateConfig) -> dict[str, Any]:
    """Write `kept.jsonl` and `dropped.jsonl`.

    Returns:
        Rows read, kept and dropped; of each evaluation set its rows and how many rows they dropped; and the n-grams
        that dropped the most, if more than one.

    Raises:
        DataError: a source that cannot be read, or a column that holds no text.
        ConfigError: an evaluation task without an end.
    """
    rows = Records(config.data)
    rows.require(*config.text)
    index = NgramIndex(config.ngram)
    sizes = {name: _add(index, name, section) for name, section in config.evaluation.items()}
    dropped_by: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    with Sieve(config.output) as sieve:
        for row in track(rows, description="rows", console=Console(stderr=True)):
            matches = _matches(index, row, config.text)
            if not matches:
                sieve.keep(row)
                continue
            sieve.drop(row, overlap=[_explain(column, match) for column, match in matches])
            dropped_by.update({match.group for _, match in matches})
            shared.update({match.shared for _, match in matches})
    summary = {
        "rows": len(rows),
        "kept": sieve.kept,
        "dropped": sieve.dropped,
        "dropped_share": sieve.dropped / len(rows),
        "ngram": config.ngram,
        "evaluation": {name: {**size, "dropped": dropped_by[name]} for name, size in sizes.items()},
        "commonest": dict(sorted(_repeated(shared), key=lambda item: (-item[1], item[0]))[:COMMONEST]),
    }
    _show(summary)
    return summary


def _add(index: NgramIndex, name: str, section: EvaluationSetSection) -> dict[str, int]:
    """Index one evaluation set; how many rows it has, and how many of them have no words to compare."""
    rows = compared = 0
    for number, texts in enumerate(_texts(name, section)):
        rows += 1
        added = [index.add(text, name, number) for text in texts]
        compared += any(added)
    if not compared:
        raise DataError(f"evaluation set {name!r} has no text with words in it, so nothing could be dropped for it")
    return {"rows": rows, "rows_without_words": rows - compared}


def _texts(name: str, section: EvaluationSetSection) -> Iterator[list[str]]:
    """The texts of each row."""
    if section.data is not None:
        rows = Records(section.data)
        rows.require(*section.text)
        yield from ([text for _, text in _columns(row, section.text)] for row in rows)
        return
    assert section.task is not None
    task = component.build("task", section.task)
    if not isinstance(task, FiniteTask):
        raise ConfigError(f"evaluation.{name}: task {task.name!r} makes problems without end; take one over a data set")
    yield from ([task.row(number).text] for number in range(task.size))


def _columns(row: Row, columns: list[str]) -> Iterator[tuple[str, str]]:
    """Each column that has a text, with it; a row may lack some."""
    for column in columns:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{row.place}: column {column!r} holds a {type(value).__name__}; a text was expected")
        if value:
            yield column, value


def _matches(index: NgramIndex, row: Row, columns: list[str]) -> list[tuple[str, Match]]:
    return [(column, match) for column, text in _columns(row, columns) for match in index.matches(text)]


def _repeated(counts: Counter[str]) -> list[tuple[str, int]]:
    return [(ngram, count) for ngram, count in counts.items() if count > 1]


def _explain(column: str, match: Match) -> dict[str, Any]:
    return {"column": column, "evaluation": match.group, "evaluation_row": match.row, "shared": match.shared}


def _show(summary: dict[str, Any]) -> None:
    """The counts as tables on standard error."""
    console = Console(stderr=True)
    title = f"{summary['dropped']:,} of {summary['rows']:,} rows dropped ({100 * summary['dropped_share']:.2f} %)"
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    for heading in ("evaluation set", "its rows", "rows dropped"):
        table.add_column(heading, justify="left" if heading == "evaluation set" else "right")
    for name, counts in summary["evaluation"].items():
        table.add_row(name, f"{counts['rows']:,}", f"{counts['dropped']:,}")
    console.print(table)
    for ngram, count in list(summary["commonest"].items())[:5]:
        console.print(f"{count:>7,} rows share: {ngram}", style="dim", markup=False, highlight=False)
