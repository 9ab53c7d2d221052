"""A recipe whose base model was released in FP8: refused before anything runs, unless a stage casts it first."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cli import CHECKPOINT_VERBS, VERBS
from megatron_r1.config.convert import CastConfig
from megatron_r1.convert.verbs import run_cast
from megatron_r1.errors import ConfigError
from megatron_r1.recipe.expand import read_recipe
from megatron_r1.recipe.forecast import Forecast, fits, forecasts
from megatron_r1.recipe.plan import Plan
from megatron_r1.recipe.tree import resolve
from megatron_r1.train.learner import _check_servable
from tests.convert.invented import contents, tiny, write

QUESTIONS = {"type": "math", "source": "x.jsonl"}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A tiny DeepSeek-V3 in DeepSeek's FP8."""
    base = write(tmp_path / "trained", tiny(hidden_size=128))
    run_cast(CastConfig(source=base, output=tmp_path / "released", dtype="fp8"))
    return tmp_path / "released"


def recipe(folder: Path, actor: str, **stages: Any) -> Plan:
    zero = {
        "verb": "rl",
        "model": {"path": actor},
        "steps": 5,
        "questions": 8,
        "group_size": 4,
        "minibatches": 2,
        "data": {"task": QUESTIONS},
        "heldout": {"task": QUESTIONS},
        "optim": {"lr": 1e-6},
        "rollout": {"max_model_len": 256, "max_tokens": 128},
    }
    tree = {"output": str(folder / "out"), "stages": {**stages, "zero": zero}}
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree))
    return read_recipe(folder / "recipe.toml", [], VERBS | CHECKPOINT_VERBS)


def planned(plan: Plan) -> Forecast:
    [zero] = [one for one in forecasts(plan) if one.stage.name == "zero"]
    return zero


def test_the_plan_names_the_command(released: Path, tmp_path: Path) -> None:
    plan = recipe(tmp_path, str(released))
    made = planned(plan).made
    assert made is not None
    [finding] = [one for one in made.findings if one.kind == "illegal"]
    assert f"`megatron-r1 cast {released} FOLDER`" in finding.text
    assert not fits(planned(plan))
    with pytest.raises(ConfigError, match="megatron-r1 cast"):
        _check_servable(released)


def test_a_stage_that_casts_makes_it_fit(released: Path, tmp_path: Path) -> None:
    """As long as nothing has run, and once the stage has."""
    plan = recipe(tmp_path, "@base/hf", base={"verb": "cast", "source": str(released), "folder": "hf"})
    base, before = plan.stage("base"), contents(released)
    assert plan.stages == [base, plan.stage("zero")]
    assert fits(planned(plan))
    run_cast(CastConfig(**resolve(base.config, plan.output), output=plan.folder(base)))
    assert fits(planned(plan))
    _check_servable(Path(resolve(plan.stage("zero").config["model"]["path"], plan.output)))
    assert (plan.folder(base) / base.final).exists()
    assert contents(released) == before


@pytest.mark.parametrize(
    "stage", [{"verb": "cast", "dtype": "fp8"}, {"verb": "quantize", "format": "fp8_block"}], ids=["cast", "quantize"]
)
def test_a_stage_that_quantises_is_no_base(stage: dict[str, str], tmp_path: Path) -> None:
    trained = write(tmp_path / "trained", tiny(hidden_size=128))
    plan = recipe(tmp_path, "@base/hf", base={**stage, "source": str(trained), "folder": "hf"})
    assert not fits(planned(plan))
