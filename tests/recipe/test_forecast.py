"""A recipe is planned stage by stage before anything of it has run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cli import VERBS
from megatron_r1.config.plan import PlanConfig
from megatron_r1.errors import ConfigError
from megatron_r1.recipe.choice import Choice
from megatron_r1.recipe.expand import read_recipe
from megatron_r1.recipe.forecast import Forecast, description, fits, forecasts, run
from megatron_r1.recipe.show import dry_run
from tests.model.conftest import MODEL

QUESTIONS = {"type": "math", "source": "x.jsonl"}
RECIPE: dict[str, Any] = {
    "output": "out",
    "plan": {"mean_tokens": 64, "price": 2.0, "models": {"models/absent": str(MODEL)}},
    "common": {"engines": {"rollout": {"max_model_len": 256, "max_tokens": 128}}},
    "stages": {
        "tokenizer": {"verb": "tokenizer train", "input": ["x.jsonl"], "vocab_size": 400},
        "tuned": {
            "verb": "sft",
            "model": {"path": "models/absent"},
            "data": ["chats.jsonl"],
            "batch": 8,
            "max_length": 256,
            "tokens_per_microbatch": 512,
            "plan": {"samples": 80},
        },
        "zero": {
            "verb": "rl",
            "use": ["engines"],
            "model": {"path": "@tuned/hf"},
            "steps": 5,
            "questions": 8,
            "group_size": 4,
            "minibatches": 2,
            "tokens_per_microbatch": 512,
            "data": {"task": QUESTIONS},
            "heldout": {"task": QUESTIONS},
            "optim": {"lr": 1e-6},
            "parallel": {"expert": 2},
            "plan": {"gpus": 4},
        },
    },
    "evaluation": {
        "use": ["engines"],
        "models": {"zero": {"path": "@zero/hf"}},
        "tasks": {"sums": {"task": QUESTIONS}},
        "plan": {"samples": 100},
    },
}


def written(folder: Path, tree: dict[str, Any], name: str = "recipe.toml") -> Path:
    (folder / name).write_text(tomli_w.dumps(tree))
    return folder / name


def planned(path: Path, *overrides: str) -> dict[str, Forecast]:
    return {one.stage.name: one for one in forecasts(read_recipe(path, list(overrides), VERBS))}


def test_every_stage_has_a_plan(tmp_path: Path) -> None:
    """A model that is not there yet has the config.json of what the stage that makes it begins from."""
    made = planned(written(tmp_path, RECIPE))
    assert list(made) == ["tokenizer", "tuned", "zero", "evaluate_zero"]
    assert all(map(fits, made.values()))
    assert made["tokenizer"].why == "no GPU"
    found = description(list(made.values()))
    plans = {one["stage"]: one["plan"] for one in found["stages"]}
    assert plans["tuned"]["parameters"] == plans["zero"]["parameters"] == found["parameters"]
    assert plans["tuned"]["steps"] == 2 * 80 / 8
    assert (plans["zero"]["trainer_gpus"], plans["zero"]["gpus"]) == (4, 5)
    assert plans["evaluate_zero"]["gpus"] == 1
    assert found["gpus"] == 5
    hours = sum(plan["gpu_hours"] for plan in plans.values() if plan)
    assert found["gpu_hours"] == pytest.approx(hours)


def test_a_model_without_a_config_is_named(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(RECIPE))
    del tree["plan"]["models"]
    one = planned(written(tmp_path, tree))["zero"]
    assert not fits(one)
    assert '[plan.models] "models/absent" = "FOLDER"' in one.why


def test_a_dry_run_plans_recipes_that_have_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, RECIPE)
    dry_run(read_recipe(path, [], VERBS), Choice(), as_json=True, stage=None)
    assert json.loads(capsys.readouterr().out)["plan"]["fits"]
    dry_run(read_recipe(path, [], VERBS), Choice(), as_json=False, stage=None)
    text = capsys.readouterr().out
    for words in ("planned on H100", "at train", "1 engine of 1 GPU:", "GPU-hours", "at 2 each"):
        assert words in text
    without = {key: value for key, value in RECIPE.items() if key != "plan"}
    dry_run(read_recipe(written(tmp_path, without), [], VERBS), Choice(), as_json=False, stage=None)
    assert "planned" not in capsys.readouterr().out


def test_the_command_plans_recipes_and_their_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, RECIPE)
    assert run(PlanConfig(run_file=path), [], True, VERBS) == 0
    assert len(json.loads(capsys.readouterr().out)["stages"]) == 4
    assert run(PlanConfig(run_file=path, stage="zero", gpus=8), ["--stages.zero.steps=7"], True, VERBS) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trainer_gpus"], found["steps"]) == (8, 7)
    assert run(PlanConfig(run_file=path, stage="zero", gpus=3), [], True, VERBS) == 1
    with pytest.raises(ConfigError, match="--stage NAME"):
        run(PlanConfig(run_file=path, search=True), [], True, VERBS)


def test_a_recipe_over_another(tmp_path: Path) -> None:
    written(tmp_path, RECIPE)
    larger = {"extends": "recipe.toml", "plan": {"mean_tokens": 32}, "stages": {"zero": {"plan": {"gpus": 8}}}}
    plan = read_recipe(written(tmp_path, larger, "larger.toml"), ["--stages.zero.steps=9"], VERBS)
    zero = plan.stage("zero")
    assert (zero.plan.gpus, zero.plan.mean_tokens, zero.plan.price, zero.config["steps"]) == (8, 32, 2.0, 9)
    assert plan.stage("tuned").plan.mean_tokens == 32


@pytest.mark.parametrize("name", ["larger.toml", "../recipe.toml"])
def test_what_cannot_be_extended(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another recipe in the same folder"):
        read_recipe(written(tmp_path, {"extends": name}, "larger.toml"), [], VERBS)


def test_plans_are_no_part_of_what_a_stage_is_made_of(tmp_path: Path) -> None:
    """So that another guess about lengths runs nothing again."""
    settings = [
        read_recipe(written(tmp_path, RECIPE | {"plan": plan}), [], VERBS).stage("zero").settings
        for plan in ({"mean_tokens": 64}, {"mean_tokens": 65})
    ]
    assert settings[0] == settings[1]
