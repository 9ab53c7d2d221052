"""A recipe for people: its graph before a run, its state during one, its figures at the end."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.recipe.choice import Choice
from megatron_r1.recipe.figures import model_figures, unmatched
from megatron_r1.recipe.hashes import Hashes, files_of
from megatron_r1.recipe.lock import is_held
from megatron_r1.recipe.outside import place
from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.record import read_lineage
from megatron_r1.recipe.standing import Ledger, Standing
from megatron_r1.recipe.tree import resolve

WORDS = {
    "done": "done",
    "new": "not run",
    "waiting": "waits",
    "started": "interrupted",
    "changed": "out of date",
}


def show_status(output: Path, as_json: bool) -> None:
    """`megatron-r1 status`: the graph of an output folder, the state of each stage, and the figures so far.

    Raises:
        DataError: no recipe has run there.
    """
    _show(Plan.read(output), as_json, Choice())


def dry_run(plan: Plan, choice: Choice, as_json: bool, stage: str | None) -> None:
    """`megatron-r1 run --dry-run`: the graph as it stands, with what each stage needs; or the run file of one stage.

    Raises:
        ConfigError: no such stage.
    """
    choice.stages(plan)  # a wrong name is better found now
    if stage is not None:
        chosen = plan.stage(stage)
        config = resolve(chosen.config, plan.output) | {"output": str(plan.folder(chosen))}
        print(tomli_w.dumps(config), end="")
        return
    if not plan.planned:
        _show(plan, as_json, choice)
        return
    from megatron_r1.recipe import forecast  # it takes the seconds that torch takes

    made = forecast.forecasts(plan)
    _show(plan, as_json, choice, forecast.description(made) if as_json else None)
    if not as_json:
        print()
        forecast.print_forecasts(made)


def _show(plan: Plan, as_json: bool, choice: Choice, forecast: Mapping[str, Any] | None = None) -> None:
    description = describe(plan, Ledger(plan, Hashes(plan.output / Hashes.FILE)).standings(), choice)
    if as_json:
        print(json.dumps(description | ({"plan": forecast} if forecast else {})))
    else:
        print_graph(plan, description)


def describe(plan: Plan, standings: Mapping[str, Standing], choice: Choice) -> dict[str, Any]:
    """What there is to say about a plan: `title`, `output`, `running`, `stages` (see `_row`), `models`, `missing`."""
    running = is_held(plan.output)
    rows = {stage.name: _row(plan, stage, standings[stage.name], running) for stage in plan.stages}
    for stage in choice.begins_anew(plan):
        rows[stage.name] |= {"state": "would run anew", "why": ""}
    chosen = choice.stages(plan)
    for stage in plan.stages:
        if stage not in chosen:
            rows[stage.name] |= {"state": "left out", "why": ""}
    unfinished = choice.unfinished(plan)
    return {
        "title": plan.title,
        "output": str(plan.output),
        "running": running,
        "stages": list(rows.values()),
        "models": {model: model_figures(plan, name) for model, name in plan.models.items()},
        "missing": missing(chosen) + ([unfinished] if unfinished else []),
    }


def print_graph(plan: Plan, description: Mapping[str, Any]) -> None:
    """The graph as a table on standard output; for `status` and `--dry-run`."""
    console = Console()
    table = Table(title=_title(plan), title_justify="left", box=None, header_style="dim", pad_edge=False)
    for column in ("", "stage", "verb", "needs", "state", "time", "finished"):
        table.add_column(
            column, justify="right" if column in {"", "time"} else "left", no_wrap=column not in {"verb", "needs"}
        )
    for number, row in enumerate(description["stages"], 1):
        times = [duration(row["seconds"]), _clock(row["finished"])]
        cells = [row["stage"], row["verb"], ", ".join(row["needs"]), row["state"], *times]
        table.add_row(str(number), *[escape(cell) for cell in cells])
    console.print(table)
    print_models(plan, console)
    reasons = [f"{row['stage']} {row['state']}: {row['why']}" for row in description["stages"] if row["why"]]
    for note in [*reasons, *description["missing"]]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def print_outcome(plan: Plan, states: Mapping[str, str], seconds: Mapping[str, float | None]) -> None:
    """At the end of a run: stages with what was done and how long they took, and the figures."""
    console = Console(stderr=True)
    table = Table(title=_title(plan), title_justify="left", box=None, header_style="dim", pad_edge=False)
    for column in ("stage", "verb", "state", "time"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for stage in plan.stages:
        table.add_row(stage.name, stage.verb, states[stage.name], duration(seconds.get(stage.name)))
    console.print(table)
    print_models(plan, console)
    for line in unmatched(plan):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def print_models(plan: Plan, console: Console) -> None:
    """The figures of the models that have been evaluated."""
    rows = {model: model_figures(plan, name) for model, name in plan.models.items()}
    if not any(value is not None for row in rows.values() for value in row.values()):
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("model")
    for figure in plan.figures:
        table.add_column(escape(figure), justify="right")
    for model, row in rows.items():
        table.add_row(model, *[_value(value) for value in row.values()])
    console.print()
    console.print(table)


def missing(stages: Sequence[Stage]) -> list[str]:
    """What a run of them would look for in vain."""
    return [
        f"stage {stage.name} needs {text}, which does not exist"
        for stage in stages
        for text in stage.files
        if not files_of(place(text))
    ]


def duration(seconds: float | None) -> str:
    """2.3 s, 4:05 min, 3:07 h."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def _row(plan: Plan, stage: Stage, standing: Standing, running: bool) -> dict[str, Any]:
    record = standing.record
    last = record.attempts[-1] if record and record.attempts else None
    lineage = read_lineage(plan.folder(stage)) or {}
    state, why = WORDS[standing.state], standing.why
    if standing.state == "started" and last:
        state, why = {"running": "running" if running else "killed"}.get(last.state, last.state), ""
    return {
        "stage": stage.name,
        "verb": stage.verb,
        "needs": stage.needs,
        "state": state,
        "why": why,
        "started": record.attempts[0].started if record and record.attempts else None,
        "finished": lineage.get("finished"),
        "seconds": record.seconds if record else None,
        "attempts": len(record.attempts) if record else 0,
    }


def _clock(time: str | None) -> str:
    """A time of a record, where the reader is."""
    return datetime.fromisoformat(time).astimezone().strftime("%m-%d %H:%M") if time else ""


def _title(plan: Plan) -> str:
    return escape(f"{plan.title or 'recipe'}: {plan.output}")


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))
