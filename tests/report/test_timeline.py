"""What went on when: who notes it, what is drawn of it."""

import asyncio
import json

import pytest

from megatron_r1.report import timeline
from megatron_r1.report.spans import KEPT, LEARNER, SPANS, SYNC, Span, Spans, lane, span, sync_seconds


@pytest.fixture(autouse=True)
def _nothing_before() -> None:
    SPANS.take()


def step(number: int, begin: float, *spans: Span) -> dict:
    return timeline.row(number, spans, began=begin, start=100.0)


def test_a_span_belongs_to_the_lane_of_its_task_whatever_thread_does_it() -> None:
    def load() -> None:
        with span("load"), span(""):
            pass

    async def engine(name: str) -> None:
        with lane(name):
            await asyncio.to_thread(load)

    async def both() -> None:
        await asyncio.gather(engine("engine-0"), engine("engine-1"))

    load()
    asyncio.run(both())
    found = SPANS.take()
    assert sorted((one.lane, one.name) for one in found) == [("engine-0", "load"), ("engine-1", "load")]
    assert all(one.seconds >= 0 for one in found)
    assert SPANS.take() == []


def test_what_no_report_takes_does_not_grow() -> None:
    spans = Spans()
    for number in range(KEPT + 5):
        spans.add(LEARNER, "update", number, number + 1)
    assert len(spans.take()) == KEPT


def test_seconds_of_handing_over_are_means_over_engines() -> None:
    """Engine 0 loads for 1 + 2 s, engine 1 for 5 s; the learner's own phases are counted elsewhere."""
    spans = [
        *(Span("engine-0", "load", 0.0, 1.0), Span("engine-0", "load", 1.0, 2.0), Span("engine-1", "load", 0.0, 5.0)),
        *(Span(SYNC, "gather", 0.0, 0.5), Span(LEARNER, "update", 0.0, 9.0)),
    ]
    assert sync_seconds(spans) == {"sync_seconds/load": 4.0, "sync_seconds/gather": 0.5}


def test_the_last_steps_are_drawn_to_scale() -> None:
    """Steps of 10 s from second 10 on; three of them fill the width."""
    rows = [
        step(
            number,
            100.0 + 10 * number,
            Span(LEARNER, "rollout", 100.0 + 10 * number, 6.0),
            Span(LEARNER, "sync", 106.0 + 10 * number, 4.0),
            Span("engine-10", "load", 107.0 + 10 * number, 2.0),
            Span("engine-2", "load", 107.0 + 10 * number, 1.0),
            Span(SYNC, "gather", 106.0 + 10 * number, 1.0),
        )
        for number in range(5)
    ]
    drawing = timeline.draw(json.loads(json.dumps(rows)))
    assert drawing is not None
    assert (drawing.first, drawing.last, drawing.seconds) == (2, 4, "30.0 s")
    assert [name for name, _ in drawing.lanes] == [LEARNER, SYNC, "engine-2"], "the first engines only"
    scale = (timeline.WIDTH - timeline.LABEL) / 30
    box = next(box for box in drawing.boxes if box.title == "learner, step 3: sync, 4.0 s")
    assert (box.x, box.width) == (pytest.approx(timeline.LABEL + 16 * scale), pytest.approx(4 * scale))
    assert [name for _, name in drawing.ticks] == ["step 2", "step 3", "step 4"]
    assert [name for name, _ in drawing.legend] == ["rollout", "sync", "load", "gather"]


def test_a_run_without_engines_has_no_timeline() -> None:
    assert timeline.draw([]) is None
    assert timeline.draw([step(0, 100.0, Span(LEARNER, "update", 100.0, 1.0))]) is None


def test_a_run_notes_its_steps_and_what_lies_between_them(open_report) -> None:
    with open_report(steps=2) as report:
        with report.phase("start"), lane(SYNC), span("gather"):
            pass
        for number in range(2):
            with report.step(number), report.phase("sync"), lane(SYNC), span("write"):
                pass
    rows = [json.loads(line) for line in (report.output / "timeline.jsonl").read_text().splitlines()]
    noted = [sorted((one[0], one[1]) for one in row["spans"]) for row in rows]
    within = [(LEARNER, "sync"), (SYNC, "write")]
    assert noted == [sorted([(LEARNER, "start"), (SYNC, "gather"), *within]), within]
    metrics = [json.loads(line) for line in (report.output / "metrics.jsonl").read_text().splitlines()]
    assert ["sync_seconds/gather" in row for row in metrics if row["kind"] == "step"] == [False, False]
    assert all(row["sync_seconds/write"] >= 0 for row in metrics if row["kind"] == "step")
    assert 'aria-label="Timeline of the last steps"' in (report.output / "report.html").read_text()
