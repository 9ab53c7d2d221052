"""`megatron-r1 data filter`: the rows of a data set that are worth training on.

Deduplication, length, and whether a model solves the question sometimes but not always (as open-r1's
`scripts/pass_rate_filtering` has it; there the bounds are 0.1 and 0.9).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_r1.config import component
from megatron_r1.config.evaluation import FilterConfig, LengthSection, PassRateSection
from megatron_r1.data.files import write_json
from megatron_r1.data.overlap import bare
from megatron_r1.data.questions import question
from megatron_r1.data.sieve import Sieve
from megatron_r1.data.tasks.records import RecordsTask
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.evaluate.estimators import pass_rate
from megatron_r1.rollout.answers import digest
from megatron_r1.rollout.sampling import OpenEngine, Sampler, check_judged, open_fleet
from megatron_r1.types import Question


@dataclass(frozen=True)
class Dropped:
    """Why a row is dropped."""

    reason: str
    detail: Any


def run(config: FilterConfig, open_engine: OpenEngine = open_fleet) -> dict[str, Any]:
    """Write `kept.jsonl`, `dropped.jsonl` and `summary.json`.

    With [pass_rate], kept rows get a column `pass_rate`. Killed and started again, it goes on after the last whole
    batch; started again with other bounds, it samples nothing.

    Returns:
        Rows read, kept, and dropped for each reason; and how many questions have which pass rate.

    Raises:
        ConfigError: a task that is not over a data set, or rewards that do not judge correctness.
        DataError: a row, tokenizer or model that cannot be read; no row is kept.
        EngineError: the engines do not start or die.
    """
    task = component.build("task", config.data.task)
    if not isinstance(task, RecordsTask):
        raise ConfigError(f"data.task {config.data.task['type']!r} is not over a data set, so it has no rows to filter")
    if config.pass_rate is not None:
        check_judged(config.rewards)
    dropped = _without_model(config, task)
    left = [number for number in range(task.size) if number not in dropped]
    rates = _rates(config, task, left, open_engine)
    if config.pass_rate is not None:
        dropped |= _out_of_bounds(config.pass_rate, rates)
    with Sieve(config.output) as sieve:
        for number, row in enumerate(track(task.records, description="writing", console=Console(stderr=True))):
            if number in dropped:
                sieve.drop(row, reason=dropped[number].reason, detail=dropped[number].detail)
            else:
                sieve.keep(row, **({"pass_rate": rates[number]} if number in rates else {}))
    summary = {
        "rows": task.size,
        "kept": sieve.kept,
        "dropped": dict(sorted(Counter(why.reason for why in dropped.values()).items())),
        "pass_rates": _counts(rates),
    }
    _show(summary)
    if not sieve.kept:
        raise DataError(
            f"none of {task.size:,} rows is kept (dropped: {summary['dropped']}); {config.output / 'dropped.jsonl'} "
            "has each with its reason: loosen the bound that drops most"
        )
    write_json(config.output / "summary.json", summary)
    return summary


def _without_model(config: FilterConfig, task: RecordsTask) -> dict[int, Dropped]:
    """Numbers of the rows that are dropped before anything is sampled."""
    tokenizer = _tokenizer(config)
    longest = config.pass_rate.rollout.max_model_len - 1 if config.pass_rate else None
    first: dict[str, int] = {}
    dropped: dict[int, Dropped] = {}
    for number in track(range(task.size), description="reading", console=Console(stderr=True)):
        try:
            asked = _question(config, task, number)
        except DataError as error:
            if not config.drop_unreadable:
                raise
            dropped[number] = Dropped("unreadable", str(error))
            continue
        text = asked.metadata["text"]
        same = first.setdefault(digest(bare(text)), number) if config.deduplicate else number
        tokens = len(tokenizer.encode_prompt(asked.prompt)) if tokenizer else 0
        if same != number:
            dropped[number] = Dropped("duplicate", task.records[same].place)
        elif config.length and (unfit := _unfit(config.length, len(text), tokens)):
            dropped[number] = unfit
        elif longest is not None and tokens > longest:
            dropped[number] = Dropped("no room for a response", f"{tokens} tokens")
    return dropped


def _question(config: FilterConfig, task: RecordsTask, number: int) -> Question:
    return question(config.data, task.name, str(number), task.row(number))


def _tokenizer(config: FilterConfig) -> Tokenizer | None:
    """What counts tokens, where they have to be counted."""
    if config.pass_rate:
        return Tokenizer.load(config.tokenizer or config.pass_rate.tokenizer or config.pass_rate.model.path)
    return Tokenizer.load(config.tokenizer) if config.tokenizer else None


def _unfit(bounds: LengthSection, characters: int, tokens: int) -> Dropped | None:
    for length, unit, least, most in (
        (characters, "characters", bounds.min_characters, bounds.max_characters),
        (tokens, "tokens", bounds.min_tokens, bounds.max_tokens),
    ):
        if least is not None and length < least:
            return Dropped("too short", f"{length} {unit}")
        if most is not None and length > most:
            return Dropped("too long", f"{length} {unit}")
    return None


def _rates(
    config: FilterConfig, task: RecordsTask, numbers: list[int], open_engine: OpenEngine
) -> dict[int, float | None]:
    """The pass rate of each row, by number; empty without [pass_rate]."""
    section = config.pass_rate
    if section is None:
        return {}
    questions = (_question(config, task, number) for number in numbers)
    with Sampler(section, config.output, open_engine) as sampler:
        answered = sampler.answers(questions, len(numbers), config.rewards, config.data.task, section.samples)
        return {number: pass_rate(answers) for number, (_, answers) in zip(numbers, answered, strict=True)}


def _out_of_bounds(bounds: PassRateSection, rates: dict[int, float | None]) -> dict[int, Dropped]:
    dropped: dict[int, Dropped] = {}
    for number, rate in rates.items():
        if rate is None:
            dropped[number] = Dropped("not judged", "no reward could say whether an answer is right")
        elif not bounds.min < rate < bounds.max:
            dropped[number] = Dropped("too hard" if rate <= bounds.min else "too easy", rate)
    return dropped


def _counts(rates: dict[int, float | None]) -> dict[str, int]:
    """How many questions have which pass rate, lowest first."""
    counts = Counter(rate for rate in rates.values() if rate is not None)
    return {f"{rate:.4g}": counts[rate] for rate in sorted(counts)}


def _show(summary: dict[str, Any]) -> None:
    """The counts as a table on standard error."""
    table = Table(title=f"{summary['kept']:,} of {summary['rows']:,} rows kept", title_justify="left", box=None)
    table.add_column("dropped", justify="right")
    table.add_column("why")
    for reason, count in summary["dropped"].items():
        table.add_row(f"{count:,}", reason)
    Console(stderr=True).print(table)
