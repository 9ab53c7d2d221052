"""`report.html`: one self-contained page, made from the files of a run directory alone."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from megatron_r1 import __version__
from megatron_r1.report import timeline
from megatron_r1.report.catalogue import duration
from megatron_r1.report.charts import Chart, cards, collect, draw, phase_chart, phase_shares
from megatron_r1.report.journal import Row, read, replace_text
from megatron_r1.report.samples import exhibits
from megatron_r1.report.summary import flatten, read_summary

LONGEST_NAME = 24
"""Letters of a stage's name that fit into its box."""
_TAG = re.compile(r"(&lt;/?(?:think|answer)&gt;)")


def render(output: Path) -> Path:
    """Write `output/report.html` from the metrics, samples, summary and config beside it.

    The page loads nothing: styles, data and plotly.js are inside it, and its content security policy forbids
    every request.

    Raises:
        DataError: one of the files is damaged.
    """
    rows, summary = read(output / "metrics.jsonl"), read_summary(output)
    series = collect(rows)
    main, more = draw(series)
    shares = phase_shares(rows)
    phases = phase_chart(rows, [share.name for share in shares])
    pairs, singles = exhibits(read(output / "samples.jsonl"))
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            **_head(output, rows),
            cards=cards(series, summary, rows),
            charts=main,
            more=more,
            shares=shares,
            phases=phases,
            timeline=timeline.draw(read(output / timeline.FILE)),
            data=[_data(chart) for chart in (*main, *more, *([phases] if phases else []))],
            pairs=pairs,
            singles=singles,
            summary=[(name, _figure(value)) for name, value in flatten(summary).items()],
            plotly=Markup(get_plotlyjs()),
        )
    )
    path = output / "report.html"
    replace_text(path, page)
    return path


def _head(output: Path, rows: list[Row]) -> dict[str, Any]:
    """Title, progress, config and version."""
    run: dict[str, Any] = {"title": output.name, "total_steps": None}
    if (output / "run.json").exists():
        run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    config = output / "config.toml"
    done = max((row["step"] + 1 for row in rows if row["kind"] == "step"), default=0)
    return {
        "title": run["title"],
        "total_steps": run["total_steps"],
        "steps_done": done,
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
        "version": __version__,
    }


def environment() -> Environment:
    """Templates of the pages, with everything that a model wrote escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    environment.filters["duration"] = duration
    environment.filters["shortened"] = lambda text: (
        text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
    )
    environment.filters["short"] = lambda value: "n/a" if value is None else f"{value:.3g}"
    return environment


def _marked(text: str) -> Markup:
    """Escaped text with the reasoning and answer tags made visible."""
    return Markup(_TAG.sub(r'<span class="tag">\1</span>', str(escape(text))))


def _data(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to draw one chart."""
    whole = asdict(chart)
    return {key: whole[key] for key in ("id", "log", "bars", "percent", "traces")}


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
