"""What a run shows while it runs: a live panel on a terminal, one plain line a step anywhere else.

It goes to standard error, so that `--json` leaves standard output to the figures.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_r1.report.catalogue import CONSOLE, METRICS, duration, label, show
from megatron_r1.wording import counted

SPARKS = "▁▂▃▄▅▆▇█"
COLOURS = ("blue", "green", "magenta", "yellow", "cyan", "red", "white")


class Display(Protocol):
    """What `Report` tells a console."""

    def begin(self, step: int, phase: str) -> None: ...

    def step(self, step: int, figures: Mapping[str, float], phases: Mapping[str, float], seconds: float) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, step: int, phase: str) -> None: ...

    def step(self, step: int, figures: Mapping[str, float], phases: Mapping[str, float], seconds: float) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """One line a step, aligned, without control characters: for CI, sbatch logs and `run.log`."""

    def __init__(self, stream: TextIO, title: str, total_steps: int, first_step: int = 0) -> None:
        self._stream = stream
        self._total = total_steps
        self._pace = Pace(total_steps, first_step)
        self._widths: dict[str, int] = defaultdict(int)
        self._write(
            f"{title}: {counted(total_steps, 'step')}" + (f", going on at step {first_step}" if first_step else "")
        )

    def begin(self, step: int, phase: str) -> None:
        """Phases are only seen live."""

    def step(self, step: int, figures: Mapping[str, float], phases: Mapping[str, float], seconds: float) -> None:
        fields = [f"step {step + 1:>{len(str(self._total))}}/{self._total}"]
        for name in main_metrics(figures):
            text = show(name, figures[name])
            self._widths[name] = max(self._widths[name], len(text), 6)
            fields.append(f"{METRICS[name].short} {text:>{self._widths[name]}}")
        fields.append(f"{duration(seconds):>6}")
        left = self._pace.left(step)
        self._write("  ".join(fields) + (f"  left {duration(left)}" if left else ""))

    def message(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        self._stream.flush()

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class Panel:
    """A live picture of the run: progress and time left, the main metrics with their trend, where the time goes."""

    def __init__(self, console: Console, title: str, total_steps: int, first_step: int = 0) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=3600.0,
        )
        self._task = self._progress.add_task(escape(title), total=total_steps, completed=first_step)
        self._history: dict[str, list[float]] = defaultdict(list)
        self._phases: dict[str, float] = defaultdict(float)
        self._now: tuple[str, float] = ("starting", time.monotonic())
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=2, transient=False)
        self._live.start()

    def begin(self, step: int, phase: str) -> None:
        self._now = (f"step {step + 1}: {phase}" if phase else f"step {step + 1}", time.monotonic())

    def step(self, step: int, figures: Mapping[str, float], phases: Mapping[str, float], seconds: float) -> None:
        for name, value in figures.items():
            self._history[name].append(value)
        for name, spent in phases.items():
            self._phases[name] += spent
        self._now = ("", 0.0)
        self._progress.update(self._task, completed=step + 1)

    def message(self, text: str) -> None:
        self._live.console.print(Text(text))

    def close(self) -> None:
        self._now = ("", 0.0)
        self._live.stop()

    def _picture(self) -> Group:
        phase, since = self._now
        parts: list[Progress | Table | Text] = [self._progress]
        if self._history:
            parts.append(self._table())
        if self._phases:
            parts.append(phase_bar(self._phases, width=min(self._live.console.width, 100)))
        if phase:
            parts.append(Text(f"{phase} ({duration(time.monotonic() - since)})", style="dim"))
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title, justify in (("metric", "left"), ("first", "right"), ("now", "right"), ("trend", "left")):
            table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True)
        for name in main_metrics(self._history):
            values = self._history[name]
            table.add_row(label(name), show(name, values[0]), Text(show(name, values[-1]), "bold"), sparkline(values))
        return table


class Pace:
    """Time left, from the steps that this process has done."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._first, self._start = total_steps, first_step, time.monotonic()

    def left(self, step: int) -> float:
        """Seconds until the last step is done, now that `step` is."""
        each = (time.monotonic() - self._start) / max(step + 1 - self._first, 1)
        return each * (self._total - step - 1)


def open_display(stream: TextIO, title: str, total_steps: int, first_step: int = 0) -> Display:
    """A live panel if `stream` is a terminal, plain lines otherwise."""
    if stream.isatty():
        return Panel(Console(file=stream), title, total_steps, first_step)
    return Lines(stream, title, total_steps, first_step)


def main_metrics(names: Mapping[str, object]) -> list[str]:
    """Those of the console's metrics that are there, in the console's order."""
    return [name for name in CONSOLE if name in names]


def sparkline(values: list[float], width: int = 24) -> str:
    """The last `width` values as a line of blocks, lowest to highest."""
    recent = [value for value in values[-width:] if abs(value) < float("inf")]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in recent)


def phase_bar(phases: Mapping[str, float], width: int) -> Text:
    """Shares of the time as one coloured bar, with its legend."""
    total = sum(phases.values()) or 1.0
    bar, legend = Text(), Text()
    for index, (name, seconds) in enumerate(phases.items()):
        colour = COLOURS[index % len(COLOURS)]
        bar.append("━" * round(width * seconds / total), style=colour)
        legend.append("■ ", style=colour)
        legend.append(f"{name} {100 * seconds / total:.0f} %  ", style="dim")
    return bar + Text("\n") + legend
