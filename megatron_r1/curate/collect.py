"""`megatron-r1 collect`: responses for supervised fine-tuning, sampled, judged, filtered, rewritten, mixed.

One verb for the cold start and for rejection sampling of DeepSeek-R1 (arXiv 2501.12948, sections 2.3.1 and 2.3.3 of v1,
B.3 of v2): only the run file differs.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from megatron_r1.config.collect import CollectConfig, RowsSource, SampleSource
from megatron_r1.curate import filters, layout, mix, ready, table
from megatron_r1.curate.asking import Asked, asked, excluded
from megatron_r1.curate.candidates import Candidate, Ledger
from megatron_r1.curate.fleets import Fleets
from megatron_r1.curate.rewrite import drawn, read_prompt, rewritten
from megatron_r1.curate.selection import Selection, laid_out
from megatron_r1.data.files import write_lines
from megatron_r1.data.templates import render
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.report.summary import write_summary
from megatron_r1.rollout.sampling import OpenEngine, check_judged, open_fleet

CHATS = "chats.jsonl"


def run(config: CollectConfig, open_engine: OpenEngine = open_fleet) -> dict[str, Any]:
    """Write `chats.jsonl`, `dropped.jsonl` and `summary.json`; killed and started again, go on after the last batch.

    Returns:
        `rows`; and for each source, each domain and in `total` what was sampled, correct, dropped for which reason,
        kept and rewritten, with mean rounds and mean tokens of what is kept.

    Raises:
        ConfigError: sources that cannot be asked, judged or laid out as the run file says.
        DataError: data that cannot be read, or nothing left; the counts say why.
        EngineError: the engines do not start or die.
    """
    _check(config)
    tokenizer = Tokenizer.load(config.counting())
    questions = _questions(config)
    with Fleets(config, open_engine) as fleets, Ledger(config.output) as ledger:
        selection = Selection(config, fleets, ledger)
        read = {
            name: list(_ready(name, source, selection, ledger, tokenizer))
            for name, source in config.sources.items()
            if isinstance(source, RowsSource)
        }
        selected = read | _sampled(config, questions, selection)
        final = _final(config, selected, fleets, ledger)
        clean = mix.uncontaminated(config, final, ledger)
        chosen = mix.mixed(config, clean, ledger)
        for one in chosen:
            ledger.keep(one, sum(len(tokenizer.encode(text)) + 1 for text in one.spoken()))
    result = table.figures(ledger, config.sources)
    table.show(result)
    if not chosen:
        raise DataError(_nothing_left(config, result))
    write_lines(config.output / CHATS, mix.rows(chosen))
    return write_summary(config.output, {"rows": len(chosen), "questions": ledger.questions, **result})


def _check(config: CollectConfig) -> None:
    """What can be wrong before anything is sampled."""
    for name, source in config.sources.items():
        layout.check(source.response, f"sources.{name}.response")
        if source.prompt_template:
            render(source.prompt_template, "")
        if isinstance(source, SampleSource) and source.keep == "correct":
            check_judged(source.rewards)
        if source.rewrite is not None:
            read_prompt(name, source.rewrite)
            layout.check(source.rewrite.form, f"sources.{name}.rewrite.form", "text")


def _questions(config: CollectConfig) -> dict[str, list[Asked]]:
    """What the model of each source is asked."""
    taken = excluded(config.exclude)
    return {
        name: asked(config, name, source, taken)
        for name, source in config.sources.items()
        if isinstance(source, SampleSource)
    }


def _sampled(
    config: CollectConfig, questions: dict[str, list[Asked]], selection: Selection
) -> dict[str, list[Candidate]]:
    """What passes of each source that is sampled; those of one model follow one another."""
    models = list(config.models)
    sources = [(name, source) for name, source in config.sources.items() if isinstance(source, SampleSource)]
    sources.sort(key=lambda pair: models.index(pair[1].model))
    return {name: selection.sampled(name, source, questions[name]) for name, source in sources}


def _ready(
    name: str, source: RowsSource, selection: Selection, ledger: Ledger, tokenizer: Tokenizer
) -> Iterator[Candidate]:
    """What passes of ready rows; nothing but their own filters drops any."""
    for candidate in ready.candidates(name, source):
        ledger.sampled(candidate)
        tokens = len(tokenizer.encode(candidate.response)) if source.filters else 0
        reading = filters.Reading(candidate.question, candidate.response, True, tokens)
        fault = filters.fault(reading, source.filters) if source.filters else None
        if fault:
            ledger.drop(candidate, *fault)
        elif selection.is_new(candidate):
            yield candidate


def _final(
    config: CollectConfig, selected: dict[str, list[Candidate]], fleets: Fleets, ledger: Ledger
) -> list[Candidate]:
    """All candidates with the responses that rows store, rewritten where the run file says so."""
    models = list(config.models)
    final: dict[str, list[Candidate]] = {}
    rewriting: dict[str, list[Candidate]] = {}
    for name, source in config.sources.items():
        found = selected[name]
        marks = drawn(config.seed, name, found, source.rewrite.share if source.rewrite else 0.0)
        rewriting[name] = [one for one, mark in zip(found, marks, strict=True) if mark]
        unchanged = [one for one, mark in zip(found, marks, strict=True) if not mark]
        final[name] = list(laid_out(unchanged, source.response, ledger))
    sections = [(name, source.rewrite) for name, source in config.sources.items() if source.rewrite]
    for name, _ in sorted(sections, key=lambda pair: models.index(pair[1].model)):
        final[name] += rewritten(config, name, rewriting[name], fleets, ledger)
    return list(chain.from_iterable(final[name] for name in config.sources))


def _nothing_left(config: CollectConfig, result: dict[str, Any]) -> str:
    lines = [f"{name}: {table.explain(figures)}" for name, figures in result["sources"].items()]
    return (
        f"no row is left for {config.output / CHATS}. {'; '.join(lines)}. {config.output / 'dropped.jsonl'} has each "
        "of them with its reason: sample more, loosen the filter that drops most, or use a better model"
    )
