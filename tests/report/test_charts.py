import pytest

from megatron_r1.report.charts import cards, collect, draw, phase_chart, phase_shares


def step(number: int, **figures: float) -> dict:
    return {"kind": "step", "step": number, "elapsed": number + 1.0, "seconds": 1.0, **figures}


def test_every_metric_is_drawn_once():
    rows = [
        step(0, **{"reward": 1.0, "reward/format": 0.5, "queue_depth": 3, "kl": 0.1, "seconds/rollout": 0.5}),
        {"kind": "evaluation", "step": 1, "elapsed": 2.0, "heldout_accuracy": 0.5},
        {"kind": "phase", "step": 0, "elapsed": 2.0, "phase": "start", "seconds": 4.0},
    ]
    main, more = draw(collect(rows))
    names = [[trace["name"] for trace in chart.traces] for chart in main]
    assert names == [["Reward", "reward/format"], ["Held-out accuracy"], ["KL to the reference"]]
    assert [chart.title for chart in more] == ["queue depth"]


def test_missing_values_leave_gaps_not_zeros():
    series = collect([step(0, kl=0.5), step(1, kl=None), step(2, kl=0.25)])
    assert series["kl"][0].steps == [0, 2]
    assert series["kl"][0].values == [0.5, 0.25]


def test_a_long_series_is_thinned_and_keeps_its_maximum():
    rows = [step(i, kl=float(i % 2), logprob_difference_max=float(i == 5001)) for i in range(10_000)]
    main, _ = draw(collect(rows))
    traces = {chart.title: chart.traces[0] for chart in main}
    assert len(traces["KL"]["x"]) == 1000
    assert traces["KL"]["y"] == [0.5] * 1000
    assert max(traces["Trainer and rollout"]["y"]) == 1.0


def test_engines_have_a_curve_each_or_are_summarised():
    names = [f"fleet_tokens_per_s/engine-{number}" for number in range(9)]
    few, _ = draw(collect([step(0, **dict.fromkeys(names[:8], 1.0))]))
    assert [trace["name"] for trace in few[0].traces] == [f"engine-{number}" for number in range(8)]
    rows = [step(at, **{name: float(at + number) for number, name in enumerate(names)}) for at in (0, 10)]
    [chart], more = draw(collect(rows))
    assert {trace["name"]: trace["y"] for trace in chart.traces} == {
        "most of 9": [8.0, 18.0],
        "median of 9": [4.0, 14.0],
        "least of 9": [0.0, 10.0],
    }
    assert more == []


def test_cards_prefer_the_summary():
    rows = [
        {"kind": "evaluation", "step": 0, "elapsed": 1.0, "heldout_accuracy": 0.1, "heldout_format": 0.2},
        step(0, reward=1.0),
        {"kind": "evaluation", "step": 1, "elapsed": 75.0, "heldout_accuracy": 0.6, "heldout_format": 0.9},
    ]
    found = {card.label: card for card in cards(collect(rows), {"heldout_accuracy_final": 0.7}, rows)}
    assert (found["Held-out accuracy"].before, found["Held-out accuracy"].value) == ("10.0 %", "70.0 %")
    assert (found["Format"].before, found["Format"].value) == ("20.0 %", "90.0 %")
    assert found["Total time"].value == "1 min 15 s"


def test_phase_shares_add_up_to_the_whole():
    rows = [
        step(0, **{"seconds/rollout": 0.5, "seconds/update": 0.25}),
        {"kind": "phase", "step": 1, "elapsed": 2.0, "phase": "evaluation", "seconds": 1.0},
    ]
    shares = phase_shares(rows)
    assert {share.name: share.percent for share in shares} == {
        "evaluation": 50.0,
        "rollout": 25.0,
        "update": 12.5,
        "other": 12.5,
    }
    chart = phase_chart(rows, [share.name for share in shares])
    assert chart is not None
    assert sum(trace["y"][0] for trace in chart.traces) == pytest.approx(1.0)


def test_no_rows_no_charts():
    assert draw(collect([])) == ([], [])
    assert phase_shares([]) == []
    assert phase_chart([], []) is None
    assert [card.label for card in cards({}, {}, [])] == ["Total time"]
