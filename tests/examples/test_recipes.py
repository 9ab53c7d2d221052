"""The recipes of `examples/`: every stage's run file is valid, and the stages are those of the report."""

from pathlib import Path

import pytest

from megatron_r1.cli import CHECKPOINT_VERBS, VERBS
from megatron_r1.cluster.needs import needs
from megatron_r1.recipe.expand import read_recipe
from megatron_r1.recipe.forecast import description, forecast, forecasts
from megatron_r1.recipe.plan import Plan

ROOT = Path(__file__).parents[2]
STAGES = VERBS | CHECKPOINT_VERBS
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
        return read_recipe(Path(f"examples/{request.param}/recipe.toml"), [], STAGES)


def test_the_stages_are_the_reports(plan: Plan) -> None:
    for name, parents in MADE_OF.items():
        assert parents <= set(plan.stage(name).needs) <= parents | {"base", "small_base", "talk"}, name
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
        plan = read_recipe(Path("examples/r1_671b/recipe.toml"), [], STAGES)
    for name in ("r1_zero", "dev2", "r1"):
        run = plan.stage(name).config
        assert run["questions"] * run["group_size"] == 8192
        assert run["questions"] * run["group_size"] // run["minibatches"] == 512  # 32 questions x 16 an update
        assert run["minibatches"] * run["reference"]["refresh_every"] == 400
        assert (run["optim"]["lr"], run["loss"]["kl_coef"], run["loss"]["clip_eps"]) == (3e-6, 0.001, 10.0)
    zero, r1 = plan.stage("r1_zero").config, plan.stage("r1").config
    first, then = zero["rollout"]["max_tokens"]
    assert (first["value"], then["value"]) == (32_768, 65_536)
    assert first["until_step"] == 8_200 // zero["minibatches"]
    assert {plan.stage(name).config["rollout"]["max_tokens"] for name in ("dev2", "r1")} == {32_768}
    thousands = {name: task["weight"] for name, task in zero["data"]["task"]["tasks"].items()}
    assert thousands == {"math": 26, "code": 17, "bugs": 8, "science": 22, "logic": 15}  # Table 4
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


SIZES = {"gpus_256": 256, "recipe": 512, "gpus_1024": 1024}


@pytest.fixture(scope="module", params=list(SIZES))
def sized(request: pytest.FixtureRequest) -> tuple[int, Plan]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return SIZES[request.param], read_recipe(Path(f"examples/r1_671b/{request.param}.toml"), [], STAGES)


def test_every_stage_of_671b_fits(sized: tuple[int, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan: nothing of it has been run."""
    monkeypatch.chdir(ROOT)
    gpus, plan = sized
    found = description(forecasts(plan))
    by_name = {one["stage"]: one["plan"] for one in found["stages"]}
    assert {one["stage"]: one["why"] for one in found["stages"] if one["why"]} == {"base": "no GPU"}
    assert by_name.pop("base") is None
    wrong = [(name, text) for name, own in by_name.items() for text in own["findings"] if text["kind"] != "unwise"]
    assert wrong == []
    assert found["fits"]
    assert found["parameters"] == 671_026_419_200
    assert found["gpus"] == gpus
    assert by_name["r1_zero"]["gpus"] == by_name["dev2"]["gpus"] == by_name["r1"]["gpus"] == gpus
    for name in ("r1_zero", "dev1", "dev2", "dev3", "r1"):
        assert by_name[name]["parameters"] == 671_026_419_200
    page = (ROOT / "docs/planner.md").read_text()
    [row] = [line for line in page.splitlines() if line.startswith("| GPU-hours of R1-Zero")]
    hours = [by_name["r1_zero"]["gpu_hours"], found["gpu_hours"]]
    assert row.split(" | ")[1 + sorted(SIZES.values()).index(gpus)].rstrip(" |") == "; ".join(
        f"{one:,.0f}" for one in hours
    )


def test_the_base_model_as_it_was_released_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `config.json` is the released one, FP8 and all: without the stage `base` no actor could begin."""
    monkeypatch.chdir(ROOT)
    released = "--stages.r1_zero.model.path=models/DeepSeek-V3-Base"
    plan = read_recipe(Path("examples/r1_671b/recipe.toml"), [released], STAGES)
    made = forecast(plan, plan.stage("r1_zero"), {}).made
    assert made is not None
    [finding] = [one for one in made.findings if one.kind == "illegal"]
    assert "megatron-r1 cast models/DeepSeek-V3-Base" in finding.text


def test_the_sizes_train_the_same(sized: tuple[int, Plan]) -> None:
    """They differ in layouts alone, and in what the optimizer keeps where it is offloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        usual = read_recipe(Path("examples/r1_671b/recipe.toml"), [], STAGES)
    for stage in sized[1].stages:
        other = usual.stage(stage.name)
        found = {name for name in changed(stage.config, other.config) if not name.endswith("rollout.engines")}
        assert found <= {"parallel", "optim.offload", "optim.moments"}, stage.name


def test_every_stage_of_671b_has_its_nodes(sized: tuple[int, Plan]) -> None:
    """Under Slurm, where engines and reward models have nodes of their own: never more than the size says."""
    gpus, plan = sized
    nodes = {}
    for stage in plan.stages:
        wanted = needs(stage.config, 8)
        nodes[stage.name] = wanted.nodes * wanted.trains + len(wanted.fleet)
    assert max(nodes.values()) == nodes["r1_zero"] == nodes["r1"] == gpus // 8
    fleet = [part for node in needs(plan.stage("r1").config, 8).fleet for part in node]
    assert {(part.engine.key, part.nodes) for part in fleet} == {
        ("rollout.addresses", 4), ("reward_models.helpful.address", 2), ("reward_models.safety.address", 2),
    }  # fmt: skip


def changed(one: dict[str, object], other: dict[str, object], prefix: str = "") -> set[str]:
    """Keys whose values differ; of [parallel] as one."""
    found: set[str] = set()
    for key in one.keys() | other.keys():
        left, right, name = one.get(key), other.get(key), f"{prefix}{key}"
        if isinstance(left, dict) and isinstance(right, dict) and name != "parallel":
            found |= changed(left, right, f"{name}.")
        elif left != right:
            found.add(name)
    return found


TABLE_6 = {
    "qwen_1_5b": (1e-4, 1_543_714_304),
    "qwen_7b": (8e-5, 7_615_616_512),
    "qwen_14b": (7e-5, 14_770_033_664),
    "qwen_32b": (6e-5, 32_763_876_352),
    "llama_8b": (5e-5, 8_030_261_248),
    "llama_70b": (2e-5, 70_553_706_496),
}
"""Learning rates of the report, and parameters as the models' pages have them."""


def test_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = read_recipe(Path("examples/distillation/recipe.toml"), [], STAGES)
    found = description(forecasts(plan))
    assert found["fits"]
    assert {one["stage"]: one["plan"]["parameters"] for one in found["stages"]} == {
        name: parameters for name, (_, parameters) in TABLE_6.items()
    }
    for name, (lr, _) in TABLE_6.items():
        run = plan.stage(name).config
        assert (run["batch"], run["epochs"], run["max_length"]) == (64, 2, 32768)
        assert (run["optim"]["lr"], run["optim"]["schedule"]) == (lr, "cosine")
        assert run["optim"]["min_lr"] == pytest.approx(lr / 10)
