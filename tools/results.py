"""The tables of docs/results.md from finished recipes, one for each seed.

    python tools/results.py runs/r1_tiny runs/r1_tiny_seed_1 runs/r1_tiny_seed_2

prints Markdown: each figure of each model as the mean over the seeds with the single values behind it, and how long the
stages took.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Markdown tables of finished recipes, one for each seed.")
    parser.add_argument("folder", nargs="+", type=Path, help="output folder of a recipe")
    folders = parser.parse_args().folder
    missing = [folder for folder in folders if not (folder / "summary.json").exists()]
    if missing:
        print(
            f"no summary.json in {', '.join(map(str, missing))}: `megatron-r1 run` writes it at its end",
            file=sys.stderr,
        )
        return 2
    print(tables([json.loads((folder / "summary.json").read_text()) for folder in folders]))
    return 0


def tables(summaries: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    return f"Seeds {seeds}.\n\n{figures(summaries)}\n\n{times(summaries)}"


def figures(summaries: Sequence[dict[str, Any]]) -> str:
    """A row for each model, a column for each figure: the mean, and the seeds' values in brackets."""
    models = list(summaries[0]["models"])
    names = list(summaries[0]["models"][models[0]]) if models else []
    rows = [["model", *(name.replace("_", " ") for name in names)]]
    for model in models:
        cells = [_cell(name, [summary["models"][model][name] for summary in summaries]) for name in names]
        rows.append([f"`{model}`", *cells])
    return _markdown(rows)


def times(summaries: Sequence[dict[str, Any]]) -> str:
    """Minutes of each stage, and of all."""
    rows = [["stage", "verb", "minutes"]]
    for name, stage in summaries[0]["stages"].items():
        rows.append(
            [f"`{name}`", stage["verb"], _minutes([summary["stages"][name]["seconds"] for summary in summaries])]
        )
    rows.append(["**all**", "", _minutes([summary["seconds"] for summary in summaries])])
    return _markdown(rows)


def _cell(name: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    scale, digits = (1, 1) if "length" in name else (100, 1)
    mean = f"{scale * statistics.fmean(known):.{digits}f}"
    single = ", ".join("–" if value is None else f"{scale * value:.{digits}f}" for value in values)
    return mean if len(values) == 1 else f"**{mean}** ({single})"


def _minutes(seconds: Sequence[float | None]) -> str:
    known = [value / 60 for value in seconds if value is not None]
    return ", ".join(f"{value:.1f}" for value in known) or "–"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


if __name__ == "__main__":
    sys.exit(main())
