"""The last steps of a run as a drawing: a lane for the learner, the way of the weights and each engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_r1.report.catalogue import duration
from megatron_r1.report.journal import Row
from megatron_r1.report.spans import LEARNER, SYNC, Span

FILE = "timeline.jsonl"
ENGINES = 8
"""That are drawn, the first ones."""
STEPS = 3
"""That are drawn, the last ones."""
WIDTH, LABEL, LANE, GAP = 1120, 84, 22, 8
"""Pixels: of the drawing, of the names before the lanes, height of a lane and of what is between two."""
THINNEST = 0.75


@dataclass(frozen=True)
class Box:
    """One span as it is drawn."""

    x: float
    y: float
    width: float
    colour: int
    """Of the palette of 8; from 8 on they come again, fainter."""
    title: str


@dataclass(frozen=True)
class Timeline:
    """Ready for the template."""

    first: int
    last: int
    """Steps."""
    seconds: str
    """How long they took."""
    height: int
    lanes: list[tuple[str, int]]
    """Name, and where it is."""
    ticks: list[tuple[float, str]]
    """Place, and the step that begins there."""
    boxes: list[Box]
    legend: list[tuple[str, int]]
    """Name and colour."""
    width: int = WIDTH
    left: int = LABEL
    lane_height: int = field(default=LANE)


def row(step: int, spans: Iterable[Span], began: float, start: float) -> Row:
    """A line of `timeline.jsonl`: times since the run began, milliseconds are enough.

    Args:
        step: that has ended.
        spans: since the one before.
        began: when the step did, seconds of `time.monotonic()`.
        start: when the run did, likewise.
    """
    return {
        "step": step,
        "begin": round(began - start, 3),
        "spans": [
            [one.lane, one.name, round(one.begin - start, 3), round(one.seconds, 3)]
            for one in spans
            if one.lane in (LEARNER, SYNC) or _number(one.lane) < ENGINES
        ],
    }


def draw(rows: Sequence[Row]) -> Timeline | None:
    """The last steps; None where nothing was handed over to engines."""
    shown = rows[-STEPS:]
    spans = [(row["step"], Span(*values)) for row in shown for values in row["spans"]]
    own = [span for _, span in spans if span.lane == LEARNER]
    if not own or len(own) == len(spans):
        return None
    begin, end = shown[0]["begin"], max(span.begin + span.seconds for span in own)
    spans = [(step, span) for step, span in spans if span.begin + span.seconds > begin]
    scale = (WIDTH - LABEL) / max(end - begin, 1e-9)
    lanes = {name: place * (LANE + GAP) for place, name in enumerate(_ordered({span.lane for _, span in spans}))}
    colours = {name: place for place, name in enumerate(dict.fromkeys(span.name for _, span in spans))}

    def box(step: int, span: Span) -> Box:
        first, last = max(span.begin, begin), min(span.begin + span.seconds, end)
        width = max((last - first) * scale, THINNEST)
        title = f"{span.lane}, step {step}: {span.name}, {duration(span.seconds)}"
        return Box(LABEL + (first - begin) * scale, lanes[span.lane], width, colours[span.name], title)

    return Timeline(
        first=shown[0]["step"],
        last=shown[-1]["step"],
        seconds=duration(end - begin),
        height=len(lanes) * (LANE + GAP) + 24,
        lanes=list(lanes.items()),
        ticks=[(LABEL + (row["begin"] - begin) * scale, f"step {row['step']}") for row in shown],
        boxes=[box(step, span) for step, span in spans],
        legend=list(colours.items()),
    )


def _ordered(lanes: set[str]) -> list[str]:
    """The learner, the weights, then engines by number."""
    first = [LEARNER, SYNC]
    return sorted(lanes, key=lambda lane: (first.index(lane) if lane in first else len(first), _number(lane), lane))


def _number(lane: str) -> int:
    """Of an engine."""
    tail = lane.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0
