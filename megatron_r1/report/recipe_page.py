"""`report.html` of a recipe: one self-contained page over all of its stages, made from their folders alone.

It reads of each stage the `metrics.jsonl`, `samples.jsonl` and `summary.json` that its verb has written.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_r1 import __version__
from megatron_r1.report.catalogue import duration, show_as
from megatron_r1.report.charts import Chart, collect, draw
from megatron_r1.report.data_tables import DataTable, data_tables
from megatron_r1.report.html import environment
from megatron_r1.report.journal import read, replace_text
from megatron_r1.report.recipe_answers import compare, rollouts
from megatron_r1.report.recipe_graph import HEIGHT, WIDTH, Drawing, layout
from megatron_r1.report.summary import read_summary


@dataclass(frozen=True)
class StageState:
    """One stage as it stands."""

    name: str
    verb: str
    needs: list[str]
    """Stages that it reads."""
    state: str
    """"done", "running", "failed", "interrupted" or "waiting"."""
    seconds: float | None = None
    """What it has taken, all attempts together."""


@dataclass(frozen=True)
class ModelState:
    """One model that is evaluated."""

    name: str
    stage: str
    """The stage that evaluates it."""
    made_by: str | None
    """The stage that made it; None = it came from outside."""
    figures: dict[str, float | None]
    """Held out."""


@dataclass(frozen=True)
class RecipeState:
    """A recipe as it stands."""

    title: str
    stages: list[StageState]
    models: list[ModelState] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    """Names of the figures that each model has."""


@dataclass(frozen=True)
class Curves:
    """The charts of one stage."""

    stage: str
    verb: str
    charts: list[Chart]
    report: bool
    """Whether the stage has a report.html of its own."""


def render_recipe(output: Path, state: RecipeState) -> Path:
    """Write `output/report.html`; what is not there yet is left out.

    Raises:
        DataError: one of the files is damaged.
    """
    curves = [found for stage in state.stages if (found := _curves(output, stage))]
    comparisons, browsed = compare(output, state.models), rollouts(output, [curve.stage for curve in curves])
    page = (
        environment()
        .get_template("recipe.html.j2")
        .render(
            title=state.title,
            version=__version__,
            cards=_cards(state),
            graph=_graph(state),
            box_size=(WIDTH, HEIGHT),
            stages={stage.name: stage for stage in state.stages},
            header=[name.replace("_", " ") for name in state.figures],
            rows=[(model, _figures(model, state)) for model in state.models],
            comparisons=comparisons,
            tables=_tables(output, state),
            curves=curves,
            data=[_chart_data(curve.stage, chart) for curve in curves for chart in curve.charts],
            rollouts=[asdict(rollout) for rollout in browsed],
            plotly=Markup(get_plotlyjs()),
        )
    )
    path = output / "report.html"
    replace_text(path, page)
    return path


def _cards(state: RecipeState) -> list[tuple[str, str]]:
    done = sum(stage.state == "done" for stage in state.stages)
    spent = sum(stage.seconds or 0.0 for stage in state.stages)
    return [
        ("Stages", f"{done} of {len(state.stages)}"),
        ("Models evaluated", str(len(state.models))),
        ("Time of all stages", duration(spent)),
    ]


def _graph(state: RecipeState) -> dict[str, Any]:
    """The drawing; an evaluation is no box of its own but a figure in that of the model that it is about."""
    evaluations = {model.stage for model in state.models}
    drawn = [stage for stage in state.stages if stage.name not in evaluations]
    drawing: Drawing = layout({stage.name: stage.needs for stage in drawn})
    first = state.figures[0] if state.figures else ""
    notes = {model.made_by: _shown(state, first, model) for model in state.models if model.made_by}
    return {"drawing": drawing, "notes": notes, "figure": first.replace("_", " ")}


def _figures(model: ModelState, state: RecipeState) -> list[str]:
    return [_shown(state, name, model) for name in state.figures]


def _shown(state: RecipeState, name: str, model: ModelState) -> str:
    """A figure of the table: a length as a count, a share as a percentage.

    What lies between 0 and 1 for every model is a share; the score of a reward model may lie there for one of them.
    """
    value = model.figures.get(name)
    if not isinstance(value, int | float):
        return "–"
    if "length" in name or "tokens" in name:
        return show_as("count", value)
    known = [found for one in state.models if isinstance(found := one.figures.get(name), int | float)]
    return show_as("percent" if all(0 <= found <= 1 for found in known) else "number", value)


def _tables(output: Path, state: RecipeState) -> list[tuple[str, list[DataTable]]]:
    """The tables of the stages that make data."""
    found = []
    for stage in state.stages:
        if stage.verb.startswith("data ") or stage.verb in ("collect", "preferences"):
            tables = data_tables(read_summary(output / stage.name))
            if tables:
                found.append((stage.name, tables))
    return found


def _curves(output: Path, stage: StageState) -> Curves | None:
    rows = read(output / stage.name / "metrics.jsonl")
    if not rows:
        return None
    main, _ = draw(collect(rows))
    charts = [Chart(**{**vars(chart), "id": f"{stage.name}-{chart.id}"}) for chart in main]
    return Curves(stage.name, stage.verb, charts, (output / stage.name / "report.html").exists())


def _chart_data(run: str, chart: Chart) -> dict[str, Any]:
    whole = asdict(chart)
    return {"run": run, **{key: whole[key] for key in ("id", "log", "bars", "percent", "traces")}}
