"""From the rows of `metrics.jsonl` to what report.html draws: plotly traces, headline figures, phase shares."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, TypeGuard

from megatron_r1.report.catalogue import CHARTS, MANY, ChartPlan, Style, duration, label, show, show_as
from megatron_r1.report.journal import Row
from megatron_r1.report.metrics import MAX, RESERVED

POINTS = 1000
"""A longer series is drawn as this many bins, so that the page of a long run stays light."""
BARS = 80
"""Bins of the chart of phase times."""
SMOOTHED = 60
"""From this many points on, a series is drawn with its moving average."""

Kind = Literal["step", "evaluation"]


@dataclass(frozen=True)
class Series:
    """One metric over the steps."""

    name: str
    kind: Kind
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """One chart of the page, ready for JSON."""

    id: str
    title: str
    note: str
    log: bool
    traces: list[dict[str, Any]]
    bars: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    before: str = ""


@dataclass(frozen=True)
class PhaseShare:
    """How much of the run one phase took."""

    name: str
    duration: str
    percent: float


def collect(rows: Sequence[Row]) -> dict[str, list[Series]]:
    """Series by metric name; a metric that comes both from steps and from evaluations has two."""
    found: dict[tuple[str, Kind], Series] = {}
    for row in rows:
        kind = row["kind"]
        if kind not in ("step", "evaluation"):
            continue
        for name, value in row.items():
            if name in RESERVED or name.startswith("seconds/") or not _is_number(value):
                continue
            series = found.setdefault((name, kind), Series(name, kind, [], []))
            series.steps.append(row["step"])
            series.values.append(float(value))
    collected: dict[str, list[Series]] = {}
    for (name, _), series in found.items():
        collected.setdefault(name, []).append(series)
    return collected


def draw(series: dict[str, list[Series]]) -> tuple[list[Chart], list[Chart]]:
    """The charts of the catalogue that the run has figures for, and one for each metric that none of them shows."""
    left = dict(series)
    main: list[Chart] = []
    for plan in CHARTS:
        names = [name for pattern in plan.metrics for name in left if _matches(name, pattern)]
        curves = [curve for name in names for curve in left.pop(name)]
        if curves:
            main.append(_chart(f"chart-{len(main)}", plan, curves))
    more = [_chart(f"more-{i}", ChartPlan(label(name), (name,)), left[name]) for i, name in enumerate(sorted(left))]
    return main, more


def cards(series: dict[str, list[Series]], summary: dict[str, Any], rows: Sequence[Row]) -> list[Card]:
    """Headline figures: from the summary where it has them, from the metrics otherwise."""
    found = [
        _change("Held-out accuracy", "percent", series, ("heldout_accuracy",), summary),
        _change("Format", "percent", series, ("heldout_format", "format"), summary),
        _change("Response length", "count", series, ("heldout_length", "response_length"), summary),
        _change("Validation loss", "number", series, ("validation_loss",), summary),
    ]
    if "reward" not in series:
        found.append(_change("Loss", "number", series, ("loss",), summary))
    difference = summary.get("logprob_difference_mean")
    if _is_number(difference):
        found.append(Card("Logprob difference", show_as("scientific", difference)))
    elif "logprob_difference_mean" in series:
        values = series["logprob_difference_mean"][0].values
        found.append(Card("Logprob difference", show_as("scientific", sum(values) / len(values))))
    if "tokens_per_second" in series:
        speeds = sorted(series["tokens_per_second"][0].values)
        found.append(Card("Tokens per second", show("tokens_per_second", speeds[len(speeds) // 2])))
    total = summary.get("seconds_total")
    elapsed = max((row.get("elapsed") or 0.0 for row in rows), default=0.0)
    found.append(Card("Total time", duration(total if _is_number(total) else elapsed)))
    return [card for card in found if card]


def phase_shares(rows: Sequence[Row]) -> list[PhaseShare]:
    """Time of the whole run by phase, longest first; what lies in no phase is `other`."""
    seconds: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "phase":
            seconds[row["phase"]] = seconds.get(row["phase"], 0.0) + row["seconds"]
        elif row["kind"] == "step":
            for name, spent in _step_phases(row).items():
                seconds[name] = seconds.get(name, 0.0) + spent
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return [PhaseShare(name, duration(spent), 100 * spent / total) for name, spent in ranked if total and spent > 0]


def phase_chart(rows: Sequence[Row], order: Sequence[str]) -> Chart | None:
    """Stacked bars: seconds of a step by phase, over the steps, in the order of the phases' shares."""
    steps = [row for row in rows if row["kind"] == "step"]
    if not steps:
        return None
    width = math.ceil(len(steps) / BARS)
    bins = [steps[start : start + width] for start in range(0, len(steps), width)]
    traces = []
    for name in order:
        heights = [sum(_step_phases(row).get(name, 0.0) for row in bin_) / len(bin_) for bin_ in bins]
        if any(heights):
            middles = [sum(row["step"] for row in bin_) / len(bin_) for bin_ in bins]
            traces.append({"type": "bar", "name": name, "x": middles, "y": heights, "colour": order.index(name)})
    return Chart("phases", "Seconds of a step", "by phase", log=False, traces=traces, bars=True)


def _chart(id_: str, plan: ChartPlan, curves: Sequence[Series]) -> Chart:
    traces = []
    prefix = next((name for name in plan.metrics if name.endswith("/") and len(plan.metrics) == 1), "")
    if prefix and len(curves) > MANY:
        curves = _spread(curves, prefix)
    for colour, curve in enumerate(curves):
        text = label(curve.name.removeprefix(prefix))
        if curve.kind == "evaluation" and len({other.kind for other in curves if other.name == curve.name}) > 1:
            text += " (evaluation)"
        traces.extend(_traces(curve, text, colour))
    percent = plan.title in ("Accuracy", "Format", "Clipped and truncated", "Idle")
    return Chart(id_, plan.title, plan.note, plan.log, traces, percent=percent)


def _spread(curves: Sequence[Series], prefix: str) -> list[Series]:
    """Least, median and most of all curves at each step."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    kinds: dict[str, Callable[[list[float]], float]] = {"most": max, "median": median, "least": min}
    return [
        Series(f"{prefix}{name} of {len(curves)}", "step", steps, [of(at[step]) for step in steps])
        for name, of in kinds.items()
    ]


def _traces(curve: Series, text: str, colour: int) -> list[dict[str, Any]]:
    steps, values = _thin(curve)
    few = len(values) <= 30 or curve.kind == "evaluation"
    line = {"type": "scatter", "name": text, "x": steps, "y": values, "colour": colour}
    line["mode"] = "lines+markers" if few else "lines"
    if len(values) < SMOOTHED:
        return [line]
    faint = {**line, "mode": "lines", "faint": True, "showlegend": False, "hoverinfo": "skip"}
    return [faint, {**line, "mode": "lines", "y": _moving_average(values)}]


def _thin(curve: Series) -> tuple[list[float], list[float]]:
    """At most `POINTS` bins: the mean of each, or its largest value for a maximum."""
    count = len(curve.values)
    if count <= POINTS:
        return curve.steps, curve.values
    width = math.ceil(count / POINTS)
    starts = range(0, count, width)
    bins = [curve.values[start : start + width] for start in starts]
    values = [max(bin_) if curve.name.endswith(MAX) else sum(bin_) / len(bin_) for bin_ in bins]
    return [curve.steps[start] for start in starts], values


def _moving_average(values: Sequence[float]) -> list[float]:
    """Centred; the window is a twentieth of the series."""
    half = max(len(values) // 40, 1)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _change(
    title: str, style: Style, series: dict[str, list[Series]], names: Sequence[str], summary: dict[str, Any]
) -> Card | None:
    """First and last value of the first of `names` that the run has."""
    for name in names:
        curves = series.get(name, [])
        first = summary.get(f"{name}_base", curves[-1].values[0] if curves else None)
        last = summary.get(f"{name}_final", curves[-1].values[-1] if curves else None)
        if not _is_number(last):
            continue
        moved = not curves or len(curves[-1].values) > 1
        return Card(title, show_as(style, last), show_as(style, first) if moved and _is_number(first) else "")
    return None


def _step_phases(row: Row) -> dict[str, float]:
    phases = {
        name.removeprefix("seconds/"): value
        for name, value in row.items()
        if name.startswith("seconds/") and _is_number(value)
    }
    rest = (row.get("seconds") or 0.0) - sum(phases.values())
    return {**phases, "other": rest} if rest > 1e-3 else phases


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern) if pattern.endswith("/") else name == pattern


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
