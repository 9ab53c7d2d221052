"""What went on when: stretches of time by lane (the learner, the weights' way out, each engine), for the timeline.

Whoever does something worth seeing says so where it does it::

    with lane("engine-0"):
        with span("load"):
            ...

A report takes what has come together since its last step.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

LEARNER, SYNC = "learner", "weights"
"""Lanes of the training loop's phases, and of what the trainer does to hand over weights."""
KEPT = 10_000
"""Spans that wait for a report; without one the oldest are forgotten."""
_LANE: ContextVar[str] = ContextVar("lane", default="")


@dataclass(frozen=True)
class Span:
    """One stretch of time."""

    lane: str
    name: str
    begin: float
    """Seconds of `time.monotonic()`."""
    seconds: float


class Spans:
    """Those of this process, from all its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=KEPT)

    def add(self, lane: str, name: str, begin: float, end: float) -> None:
        with self._lock:
            self._spans.append(Span(lane, name, begin, end - begin))

    def take(self) -> list[Span]:
        """All since the last call."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans


SPANS = Spans()


@contextmanager
def lane(name: str) -> Iterator[None]:
    """What is done in this block, also in threads that `asyncio.to_thread` starts in it, belongs to a lane."""
    token = _LANE.set(name)
    try:
        yield
    finally:
        _LANE.reset(token)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Note the block under this name; outside all lanes, or without a name, nothing is noted."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if name and _LANE.get():
            SPANS.add(_LANE.get(), name, begin, time.monotonic())


def sync_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """`sync_seconds/<part>`: seconds of handing over weights; of what engines do, the mean over those that did it."""
    by_part: dict[str, dict[str, float]] = {}
    for one in spans:
        if one.lane != LEARNER:
            lanes = by_part.setdefault(one.name, {})
            lanes[one.lane] = lanes.get(one.lane, 0.0) + one.seconds
    return {f"sync_seconds/{part}": sum(lanes.values()) / len(lanes) for part, lanes in by_part.items()}
