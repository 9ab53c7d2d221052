"""`Report`: the one object through which a training loop tells what happens.

::

    with Report(output, config.report, "R1-Zero", steps, dump(config), resume_step=start) as report:
        for step in range(start, steps):
            with report.step(step):
                with report.phase("rollout"):
                    groups = ...
                report.add({"reward": 1.2, "reward/format": 0.9})
        report.summary({"heldout_accuracy_final": 0.8})

What it leaves in the run directory: `metrics.jsonl` (kind = "step", "evaluation" or "phase"), `samples.jsonl`,
`timeline.jsonl`, `run.log`, `run.json`, `config.toml`, `tensorboard/`, `wandb/`, and at the end `summary.json` and
`report.html`.
"""

import json
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.sections import ReportSection
from megatron_r1.report import timeline
from megatron_r1.report.catalogue import show
from megatron_r1.report.console import Display, Lines, Silent, open_display
from megatron_r1.report.html import render
from megatron_r1.report.journal import Journal, replace_text
from megatron_r1.report.metrics import Metrics, PhaseClock, check_names
from megatron_r1.report.samples import Pieces, sample_rows
from megatron_r1.report.spans import SPANS, Span, sync_seconds
from megatron_r1.report.summary import SUMMARY, write_summary
from megatron_r1.report.trackers import Tracker, open_trackers
from megatron_r1.types import Group
from megatron_r1.wording import counted


class Report:
    """Metrics, samples, console and final figures of one run.

    Args:
        output: the run directory.
        section: [report] of the run file.
        title: what the run is, for people: "R1-Zero".
        total_steps: steps of the whole run, the resumed part included.
        config_toml: the resolved config.
        resume_step: the first step that will be run; what an earlier run left of it and later is dropped.
        enabled: False on every rank but the first: the same calls then do nothing.
        watch: told the step, the phase ("" between phases) and whether this rank alone goes through it, whenever they
            change, on every rank.
    """

    def __init__(
        self,
        output: Path,
        section: ReportSection,
        title: str,
        total_steps: int,
        config_toml: str,
        resume_step: int = 0,
        enabled: bool = True,
        watch: Callable[[int, str, bool], None] = lambda step, phase, alone: None,
    ) -> None:
        self.output, self.enabled, self._watch = output, enabled, watch
        self._section, self._title, self._config_toml = section, title, config_toml
        self._total_steps, self._resume_step = total_steps, resume_step
        self._metrics, self._clock = Metrics(), PhaseClock()
        self._step = resume_step
        self._between: list[Span] = []
        """What went on since the step before."""
        self._in_step = self._rendered = False
        self._displays: list[Display] = [Silent()]
        self._trackers: list[Tracker] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        self.output.mkdir(parents=True, exist_ok=True)
        with self._stack:
            self._open()
            self._stack = self._stack.pop_all()
        return self

    def _open(self) -> None:
        for stale in (SUMMARY, "report.html"):  # a run that has begun again has not ended
            (self.output / stale).unlink(missing_ok=True)
        replace_text(self.output / "config.toml", self._config_toml)
        run = {"title": self._title, "total_steps": self._total_steps, "resume_step": self._resume_step}
        replace_text(self.output / "run.json", json.dumps(run) + "\n")
        self._journal = self._stack.enter_context(Journal(self.output / "metrics.jsonl", self._resume_step))
        self._samples = self._stack.enter_context(Journal(self.output / "samples.jsonl", self._resume_step))
        self._timeline = self._stack.enter_context(Journal(self.output / timeline.FILE, self._resume_step))
        earlier = max((row.get("elapsed") or 0.0 for row in self._journal.kept), default=0.0)
        self._start = time.monotonic() - earlier
        config = tomllib.loads(self._config_toml)
        for tracker in open_trackers(self._section, self.output, self._title, config, self._resume_step):
            self._trackers.append(tracker)
            self._stack.callback(tracker.close)
        log = self._stack.enter_context((self.output / "run.log").open("a" if self._resume_step else "w"))
        self._displays = [Lines(log, self._title, self._total_steps, self._resume_step)]
        if self._section.console:
            self._displays.append(open_display(sys.stderr, self._title, self._total_steps, self._resume_step))
        for display in self._displays:
            self._stack.callback(display.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        with suppress(OSError) if error else nullcontext():  # a full disk must not hide what has ended the run
            self._stack.close()
            if not self._rendered:
                render(self.output)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Time one step and, if it ends well, record what was added during it (or since the step before)."""
        self._step, self._in_step = step, True
        self._begin("")
        self._between = SPANS.take()
        start = time.monotonic()
        try:
            yield
        finally:
            self._in_step = False
        if self.enabled:
            self._finish_step(step, start)

    def _finish_step(self, step: int, start: float) -> None:
        seconds = time.monotonic() - start
        phases, spans = self._clock.take(), SPANS.take()
        figures = self._metrics.take() | sync_seconds(spans)
        self._timeline.append(timeline.row(step, [*self._between, *spans], start, self._start))
        spent = {f"seconds/{name}": round(value, 6) for name, value in phases.items()}
        row = {"kind": "step", "step": step, "elapsed": self._elapsed(), "seconds": round(seconds, 6)}
        self._journal.append({**row, **spent, **figures})
        for tracker in self._trackers:
            tracker.log(step, {**figures, "seconds": seconds, **spent})
        for display in self._displays:
            display.step(step, figures, phases, seconds)
        self._step = step + 1

    @contextmanager
    def phase(self, name: str, alone: bool = False) -> Iterator[None]:
        """Add the time of the block to a named phase; a phase inside another is not counted twice.

        `alone`: other ranks do not go through it, so it is left out where heartbeats compare how many phases the ranks
        have begun.
        """
        self._begin(name, alone)
        with self._clock.phase(name):
            yield
        self._begin(self._clock.current, alone)
        if self.enabled and not self._in_step and not self._clock.current:
            for phase, seconds in self._clock.take().items():
                row = {"kind": "phase", "step": self._step, "elapsed": self._elapsed(), "phase": phase}
                self._journal.append({**row, "seconds": seconds})

    def add(self, figures: Mapping[str, float]) -> None:
        """Metrics of the step in progress. Added again, a name is averaged over the step.

        Two kinds of name differ: `sum/<name>` is summed and recorded as `<name>`, and of a name that ends in
        `_max` the largest value is kept.
        """
        if self.enabled:
            self._metrics.add(figures)

    def set(self, figures: Mapping[str, float]) -> None:
        """Metrics of the step in progress of which the last value counts."""
        if self.enabled:
            self._metrics.set(figures)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Record an evaluation of the policy after `step` steps (0: the base; `total_steps`: the last).

        On resume it is dropped if `step >= resume_step`, so a loop evaluates before it runs step `step`.
        """
        if not self.enabled:
            return
        check_names(figures)
        self._journal.append({"kind": "evaluation", "step": step, "elapsed": self._elapsed(), **figures})
        for tracker in self._trackers:
            tracker.log(step, figures)
        values = ", ".join(f"{name} {show(name, value)}" for name, value in figures.items())
        self.message(f"evaluation after {counted(step, 'step')}: {values}")

    def samples(self, step: int, groups: Sequence[Group], tag: str, pieces: Pieces | None = None) -> None:
        """Keep a few responses of the first groups, to be read later.

        Args:
            step: as in `evaluation`.
            groups: scored groups; the same questions under two tags appear side by side in report.html.
            tag: "before", "after" or "train".
            pieces: token ids to their texts; with it the tokens are kept, too, with their log-probabilities.
        """
        if self.enabled:
            for row in sample_rows(step, groups, tag, pieces):
                self._samples.append(row)

    def message(self, text: str) -> None:
        """Say something: above the live console, and in `run.log`."""
        for display in self._displays:
            display.message(text)

    def summary(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json` and `report.html`; returns the figures as written.

        `seconds_total` is added: the time since the run began, that of earlier, killed processes included.
        """
        if not self.enabled:
            return dict(figures)
        clean = write_summary(self.output, {**figures, "seconds_total": self._elapsed()})
        for tracker in self._trackers:
            tracker.summary(clean)
        self._rendered = True
        self.message(f"report: {render(self.output)}")
        return clean

    def _begin(self, phase: str, alone: bool = False) -> None:
        self._watch(self._step, phase, alone)
        for display in self._displays:
            display.begin(self._step, phase)

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._start, 6)
