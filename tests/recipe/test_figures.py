"""The figures of a recipe, from what its evaluations wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.recipe.figures import look_up, summarize, unmatched
from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.record import Record
from megatron_r1.recipe.show import duration

RESULTS = {
    "model": "x",
    "tasks": {"sums": {"pass@1": 0.25, "pass@1_interval": [0.2, 0.3], "rewards": {"format": 0.5, "odd": None}}},
}


def stage(name: str) -> Stage:
    return Stage(
        name=name, verb="evaluate", final="results.json", settings={}, config={}, needs=[], reads=[], files=[],
        services=[],
    )  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two evaluations, of which the first has finished, in two attempts."""
    folder = tmp_path / "evaluate_base"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "lineage.json").write_text("{}")
    record = Record("evaluate_base", "evaluate", "key", {})
    for seconds in (1.5, 2.25):
        record.begin().seconds = seconds
    record.save(folder)
    return Plan(
        title="Tiny",
        seed=3,
        output=tmp_path,
        stages=[stage("evaluate_base"), stage("evaluate_r1")],
        services={},
        models={"base": "evaluate_base", "r1": "evaluate_r1"},
        figures={
            "accuracy": "tasks.sums.pass@1",
            "format": "tasks.sums.rewards.format",
            "low": "tasks.sums.pass@1_interval.0",
            "no": "tasks.sum.pass@1",
        },
    )


def test_summarize(plan: Plan) -> None:
    assert summarize(plan, {"evaluate_base": "ran", "evaluate_r1": "not run"}) == {
        "title": "Tiny",
        "seed": 3,
        "models": {
            "base": {"accuracy": 0.25, "format": 0.5, "low": 0.2, "no": None},
            "r1": {"accuracy": None, "format": None, "low": None, "no": None},
        },
        "stages": {
            "evaluate_base": {"verb": "evaluate", "state": "ran", "seconds": 3.75},
            "evaluate_r1": {"verb": "evaluate", "state": "not run", "seconds": None},
        },
        "seconds": 3.75,
    }


@pytest.mark.parametrize("left", [None, "", "[1]", "{"])
def test_results_that_were_removed_or_damaged_since_are_none(plan: Plan, left: str | None) -> None:
    results = plan.output / "evaluate_base/results.json"
    results.unlink()
    if left is not None:
        results.write_text(left)
    assert summarize(plan, {"evaluate_base": "ran", "evaluate_r1": "not run"})["models"]["base"]["accuracy"] is None


def test_a_figure_that_is_nowhere_is_told(plan: Plan) -> None:
    assert unmatched(plan) == [
        "figure 'no': no evaluation has 'tasks.sum.pass@1', did you mean 'tasks.sums.pass@1'?",
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [("model", "x"), ("tasks.sums.pass@1", 0.25), ("tasks.sums.rewards.odd", None), ("tasks", None), ("model.x", None)]
    + [("tasks.sums.pass@1_interval.1", 0.3), ("tasks.sums.pass@1_interval", None)]
    + [(f"tasks.sums.pass@1_interval.{wrong}", None) for wrong in ("2", "-1", "x")],
)
def test_look_up(path: str, value: Any) -> None:
    assert look_up(RESULTS, path) == value


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (2.34, "2.3 s"), (245, "4:05 min"), (3600, "1:00 h"), (11_220, "3:07 h")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
