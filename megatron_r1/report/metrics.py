"""How values become one number a step, and time becomes phases."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from megatron_r1.report.spans import LEARNER, SPANS

RESERVED = ("kind", "step", "elapsed", "seconds", "phase")
SUM = "sum/"
MAX = "_max"


class Metrics:
    """Values by name until `take` makes one number of each: mean, sum (`sum/...`), maximum (`..._max`) or last."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._last: dict[str, float] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        check_names(name.removeprefix(SUM) for name in figures)
        for name, value in figures.items():
            self._values.setdefault(name, []).append(float(value))

    def set(self, figures: Mapping[str, float]) -> None:
        check_names(figures)
        for name, value in figures.items():
            self._last[name] = float(value)

    def take(self) -> dict[str, float]:
        """One number a name; what was there is forgotten."""
        figures = {name.removeprefix(SUM): _reduce(name, values) for name, values in self._values.items()}
        figures.update(self._last)
        self._values, self._last = {}, {}
        return figures


class PhaseClock:
    """Seconds by phase; the time of an inner phase is not part of the outer one's."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str:
        """The innermost phase, or an empty string."""
        return self._open[-1] if self._open else ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds of each phase so far; what was there is forgotten."""
        self._mark()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _mark(self) -> None:
        """Book the time since the last mark on the phase that is open."""
        now = time.monotonic()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
            SPANS.add(LEARNER, self._open[-1], self._since, now)
        self._since = now


def _reduce(name: str, values: list[float]) -> float:
    if name.startswith(SUM):
        return sum(values)
    return max(values) if name.endswith(MAX) else sum(values) / len(values)


def check_names(names: Iterable[str]) -> None:
    """Raise `ValueError` for a metric whose name the report uses for something of its own."""
    for name in names:
        if name in RESERVED or name.startswith("seconds/"):
            raise ValueError(f"a metric cannot be called {name!r}: the report writes that name itself")
