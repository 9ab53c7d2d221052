import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.errors import DataError
from megatron_r1.report.data_tables import data_tables
from megatron_r1.report.recipe_answers import ROLLOUTS, rollouts
from megatron_r1.report.recipe_page import ModelState, RecipeState, StageState, render_recipe
from megatron_r1.types import Group, Question, Sample
from tests.report.browser import CHROMIUM, Browser
from tests.report.test_html import HOSTILE, Page

FIGURES = ["heldout_accuracy", "mean_length"]
NEEDS: dict[str, tuple[str, list[str]]] = {
    "base": ("pretrain", []),
    "r1_zero": ("rl", ["base"]),
    "cold_start": ("collect", ["r1_zero"]),
    "dev1": ("sft", ["base", "cold_start"]),
    "evaluate_base": ("evaluate", ["base"]),
    "evaluate_dev1": ("evaluate", ["dev1"]),
    "r1": ("rl", ["dev1"]),
}


def sampled(text: str, reward: float, trainer: list[float] | None = None, task: str = "arithmetic") -> Group:
    pieces = list(text)
    sample = Sample(list(range(len(pieces))), [-0.5] * len(pieces), text, True, 0, {"accuracy": reward}, reward)
    sample.trainer_logprobs = trainer
    question = Question("q-1", task, "User: 3 + 4? Assistant:", "7", {"text": "3 + 4?"})
    return Group(question, [1, 2], [sample])


def evaluated(folder: Path, **texts: str) -> None:
    folder.mkdir()
    rows = []
    for number, task in enumerate(("sums", "chat", "sums")):
        response = {"text": texts["text"], "tokens": 9, "finished": True, "correct": number == 0, "rewards": {}}
        key = {"task": task, "question_id": f"q-{number}", "question": f"{task} {number}?", "answer": "7"}
        rows.append(json.dumps(key | {"prompt": "p", "responses": [response]}))
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def recipe(tmp_path: Path, open_report: Any) -> tuple[Path, RecipeState]:
    """The folder of a recipe of seven stages, one of them still running, and its state."""
    output = tmp_path / "recipe"
    output.mkdir()
    with open_report(output=output / "r1_zero", steps=3) as report:
        for step in range(3):
            with report.step(step):
                report.add({"reward": step / 2, "accuracy": step / 3})
            text = ("no", "well <b>7</b>", "7")[step]
            apart = [-0.5 + 0.25 * (index == 1) for index in range(len(text))]
            report.samples(step, [sampled(text, step / 2, apart)], "train", lambda ids, text=text: list(text))
    with open_report(output=output / "r1", steps=1) as report, report.step(0):
        report.add({"reward": 0.0})
        report.samples(0, [sampled("no", 0.0), sampled("hello", 0.0, task="chat")], "train")
    (output / "cold_start").mkdir()
    counts = {"rows": 12, "domains": {"math": {"samples": 9, "dropped": {"wrong": 3}}, "chat": {"samples": 3}}}
    (output / "cold_start/summary.json").write_text(json.dumps(counts))
    evaluated(output / "evaluate_base", text=HOSTILE)
    evaluated(output / "evaluate_dev1", text="<think>3+4=7</think> 7")
    stages = [StageState(name, verb, needs, "done", 61.0) for name, (verb, needs) in NEEDS.items()]
    stages[3] = StageState("dev1", "sft", ["base", "cold_start"], "running")
    models = [
        ModelState("base", "evaluate_base", "base", {"heldout_accuracy": 0.25, "mean_length": 31.2}),
        ModelState("dev1", "evaluate_dev1", "dev1", {"heldout_accuracy": None}),
    ]
    return output, RecipeState("R1 <small>", stages, models, FIGURES)


def test_it_shows_what_the_stages_left(recipe: tuple[Path, RecipeState]) -> None:
    page = Page(render_recipe(*recipe))
    for text in ("R1 <small>", "6 of 7", "25.0 %", "31.2", "–", "1 min 01 s", "heldout accuracy 25.0 %", HOSTILE):
        assert text in page.text
    assert "running" in page.text
    assert "evaluate_base" not in page.text  # an evaluation is a figure of its model, not a box
    for text in ("dropped wrong", "chat 1?", "sums 0?"):
        assert text in page.text
    assert not [tag for tag, _ in page.tags if tag in ("img", "think", "small")]


def test_it_loads_nothing(recipe: tuple[Path, RecipeState]) -> None:
    page = Page(render_recipe(*recipe))
    assert not [1 for tag, attributes in page.tags if {"src", "srcset", "action", "poster", "data"} & attributes.keys()]
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    reports = ["r1_zero/report.html", "r1/report.html"]
    assert links == ["data:,", *reports]  # beside the page, and only followed when clicked
    for name in reports:
        (recipe[0] / name).unlink()
    assert "its own report" not in Page(render_recipe(*recipe)).text


def test_a_recipe_that_has_just_begun(tmp_path: Path) -> None:
    state = RecipeState("Begun", [StageState("base", "pretrain", [], "running")])
    assert "0 of 1" in Page(render_recipe(tmp_path, state)).text


def test_tables_of_a_summary() -> None:
    summary = {
        "rows": 1234,
        "by": {"math": {"n": 2, "mean": 0.51239}, "chat": {"n": 1, "deep": {"x": None}}},
        "list": [1],
    }
    plain, by = data_tables(summary)
    assert plain.rows == [("rows", ["1,234"])]
    assert by.columns == ["n", "mean", "deep x"]
    assert by.rows == [("math", ["2", "0.512", "–"]), ("chat", ["1", "–", "–"])]


def test_a_record_with_records_in_it_is_one_table() -> None:
    """As `preferences` tells of its judge: failures are not left out because a name stands beside them."""
    [table] = data_tables({"judge": {"model": "j", "failures": {"failed": 3, "timeouts": 1}, "list": [1]}})
    assert table.rows == [("model", ["j"]), ("failures failed", ["3"]), ("failures timeouts", ["1"])]
    assert data_tables({"judge": {"list": [1], "failures": {}}}) == []


def test_a_score_of_one_model_between_0_and_1_is_no_share(recipe: tuple[Path, RecipeState]) -> None:
    output, state = recipe
    models = [ModelState(name, "none", None, {"score": value}) for name, value in (("base", -1.25), ("r1", 0.75))]
    page = Page(render_recipe(output, replace(state, models=models, figures=["score"])))
    assert "0.75" in page.text
    assert "75.0 %" not in page.text


def test_the_rollouts_of_a_long_run_are_spread_over_its_steps(tmp_path: Path) -> None:
    (tmp_path / "rl").mkdir()
    response = {"text": "", "reward": 0.0, "rewards": {}, "tokens": 1, "finished": True}
    row = {"tag": "train", "task": "sums", "prompt": "p", "answer": "7", "responses": [response]}
    steps = 10 * ROLLOUTS + 7
    lines = [json.dumps(row | {"step": step}) + "\n" for step in range(steps)]
    (tmp_path / "rl/samples.jsonl").write_text("".join(lines) + lines[0][:9])
    shown = [one.step for one in rollouts(tmp_path, ["rl"])]
    assert ROLLOUTS / 2 <= len(shown) <= ROLLOUTS
    assert len({later - earlier for earlier, later in pairwise(shown)}) == 1
    assert shown[0] == 0
    assert steps - shown[-1] <= shown[1]
    (tmp_path / "rl/samples.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        rollouts(tmp_path, ["rl"])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_driven_in_a_browser(recipe: tuple[Path, RecipeState], tmp_path: Path, width: int) -> None:
    with Browser(render_recipe(*recipe), tmp_path / "profile", width) as page:
        page.wait("document.querySelectorAll('#curves-r1_zero .js-plotly-plot').length > 0")
        assert page.value("document.querySelectorAll('#graph rect').length") == 5
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        cards = "[...document.querySelectorAll('#list .response')].map((one) => one.textContent)"
        assert len(page.value(cards)) == 5
        assert page.value("document.querySelectorAll('#list b').length") == 0

        def fill(name: str, value: str) -> None:
            box = f"document.getElementById('{name}')"
            page.value(f"{box}.value = '{value}'; {box}.dispatchEvent(new Event('input', {{bubbles: true}}))")

        fill("by-stage", "r1")
        assert [("r1 ·" in card, "chat" in card) for card in page.value(cards)] == [(True, False), (True, True)]
        fill("by-task", "chat")
        assert ["hello" in card for card in page.value(cards)] == [True]
        fill("by-stage", "r1_zero")
        assert page.value(cards) == []
        fill("by-task", "arithmetic")
        assert [f"r1_zero · step {step}" in card for step, card in enumerate(page.value(cards))] == [True] * 3
        fill("by-stage", "all")
        assert len(page.value(cards)) == 4
        fill("by-task", "all")
        fill("from-reward", "0.4")
        assert len(page.value(cards)) == 2
        assert page.value("document.getElementById('count').textContent") == "2 of 5 responses"
        fill("by-text", "WELL")
        (only,) = page.value(cards)
        assert "step 1" in only
        assert "well <b>7</b>" in only
        page.hover("#list .token:nth-of-type(3)")
        page.wait("!document.getElementById('tip').hidden")
        tip = page.value("document.getElementById('tip').textContent")
        for text in ("engine    -0.500000", "trainer   -0.250000", "2.50e-1 nats"):
            assert text in tip
        fill("by-text", "nothing like it")
        assert page.value(cards) == []
        assert page.requests == [page.page.resolve().as_uri()]
        assert page.complaints == []
