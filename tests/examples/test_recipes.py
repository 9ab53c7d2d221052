"""The recipes of `examples/`: every stage's run file is valid, and the stages are those of the report."""

from pathlib import Path

import pytest

from megatron_r1.cli import VERBS
from megatron_r1.recipe.expand import read_recipe
from megatron_r1.recipe.plan import Plan

ROOT = Path(__file__).parents[2]
MADE_OF = {
    "dev1": {"cold_start"},
    "dev2": {"dev1"},
    "rejection_sampling": {"dev2"},
    "dev3": {"rejection_sampling"},
    "pairs": {"dev3"},
    "helpful": {"pairs", "dev3"},
    "safety": {"labels", "dev3"},
    "r1": {"dev3", "helpful", "safety"},
    "distilled": {"rejection_sampling"},
}
"""Stage -> what the report makes it of, besides the base models."""


@pytest.fixture(scope="module", params=["r1_tiny", "r1_671b"])
def plan(request: pytest.FixtureRequest) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return read_recipe(Path(f"examples/{request.param}/recipe.toml"), [], VERBS)


def test_the_stages_are_the_reports(plan: Plan) -> None:
    for name, needs in MADE_OF.items():
        assert needs <= set(plan.stage(name).needs) <= needs | {"base", "small_base", "talk"}, name
    assert {"r1_zero", "dev1", "dev2", "dev3", "r1", "distilled", "small_rl"} <= plan.models.keys()


def test_both_fine_tunings_begin_at_the_base(plan: Plan) -> None:
    base = plan.stage("r1_zero").settings["model"]["path"]
    assert plan.stage("dev1").settings["model"]["path"] == plan.stage("dev3").settings["model"]["path"] == base
    assert plan.stage("distilled").settings["model"]["path"] == plan.stage("small_rl").settings["model"]["path"] != base


def test_the_rewards_are_the_reports(plan: Plan) -> None:
    zero, r1 = plan.stage("r1_zero").config, plan.stage("r1").config
    assert zero["rewards"].get("language", {"weight": 0.0})["weight"] == 0.0
    assert plan.stage("dev2").config["rewards"]["language"]["weight"] == 1.0
    parts = {name: reward["part"] for name, reward in r1["rewards"].items() if reward["type"] == "reward_model"}
    assert parts == {"helpful": "summary", "safety": "response"}
    assert r1["rollout"]["temperature"] == 0.7
    assert r1["general"]["from_step"] > r1["steps"] / 3
    assert {plan.stage(name).config["kind"] for name in ("helpful", "safety")} == {"pairwise", "pointwise"}


def test_the_numbers_of_671b() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        plan = read_recipe(Path("examples/r1_671b/recipe.toml"), [], VERBS)
    for name in ("r1_zero", "dev2", "r1"):
        run = plan.stage(name).config
        assert run["questions"] * run["group_size"] == 8192
        assert run["questions"] * run["group_size"] // run["minibatches"] == 512  # 32 questions x 16 an update
        assert run["minibatches"] * run["reference"]["refresh_every"] == 400
        assert (run["optim"]["lr"], run["loss"]["kl_coef"], run["loss"]["clip_eps"]) == (3e-6, 0.001, 10.0)
    zero, r1 = plan.stage("r1_zero").config, plan.stage("r1").config
    assert zero["steps"] * zero["minibatches"] == 10_400
    assert abs(r1["steps"] * r1["minibatches"] - 1_700) < r1["minibatches"]
    assert (r1["steps"] - r1["general"]["from_step"]) * r1["minibatches"] == 400
    for name in ("dev1", "dev3"):
        run = plan.stage(name).config
        assert (run["batch"], run["max_length"], run["optim"]["lr"], run["optim"]["min_lr"]) == (128, 32768, 5e-5, 5e-6)
    judged = plan.stage("pairs").config
    assert (judged["votes"], judged["margin"]) == (4, 1.0)
    for name in ("helpful", "safety"):
        run = plan.stage(name).config
        assert (run["batch"], run["optim"]["lr"], run["epochs"], run["max_length"]) == (256, 6e-6, 1, 8192)
    distilled = plan.stage("distilled").config
    assert (distilled["batch"], distilled["optim"]["lr"]) == (64, 8e-5)
