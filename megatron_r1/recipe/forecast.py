"""What every stage of a recipe will need, planned before any of it has run."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.collect import CollectConfig
from megatron_r1.config.evaluation import EvaluateConfig, FilterConfig
from megatron_r1.config.load import validate
from megatron_r1.config.plan import PlanConfig, PlanSection
from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.config.section import Section
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.model.family import HFConfig
from megatron_r1.model.fp8 import quantization_config
from megatron_r1.model.hf_folder import QUANTIZATION, read_config
from megatron_r1.plan import summary
from megatron_r1.plan.plan import Plan as TrainingPlan
from megatron_r1.plan.plan import as_dict, plan
from megatron_r1.plan.run_file import TRAINING
from megatron_r1.plan.serving import ServedPlan, plan_served
from megatron_r1.plan.verb import run as plan_run_file
from megatron_r1.recipe.expand import read_recipe
from megatron_r1.recipe.plan import Plan, Stage, Verb
from megatron_r1.recipe.tree import reference, resolve

SAMPLING: dict[str, type[Section]] = {
    "collect": CollectConfig,
    "preferences": PreferencesConfig,
    "evaluate": EvaluateConfig,
    "data filter": FilterConfig,
}
"""Verbs that sample from finished models."""


@dataclass(frozen=True)
class Forecast:
    """Of one stage."""

    stage: Stage
    made: TrainingPlan | ServedPlan | None
    why: str = ""
    """Why there is no plan."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `null` under "plan" of a verb that needs no GPU."""
        own = as_dict(self.made) if isinstance(self.made, TrainingPlan) else self.made and self.made.as_dict()
        return {"stage": self.stage.name, "verb": self.stage.verb, "plan": own, "why": self.why}


def run(config: PlanConfig, overrides: Sequence[str], as_json: bool, verbs: Mapping[str, Verb]) -> int:
    """`megatron-r1 plan` of a run file or a recipe; returns the exit code, 1 where something does not fit.

    Raises:
        ConfigError: what `read_recipe` and `plan.verb.run` raise; an option that is of run files alone.
    """
    if not _is_recipe(config.run_file):
        if config.stage:
            raise ConfigError(f"--stage {config.stage}: {config.run_file} is no recipe")
        return plan_run_file(config, overrides, as_json)
    if config.search or config.prove or config.html:
        name = config.stage or "NAME"
        raise ConfigError(
            "--search, --prove and --html are of one run file: write a stage's with "
            f"`megatron-r1 run {config.run_file} --stage {name} > {name}.toml`, and plan that: `megatron-r1 plan "
            f"{name}.toml --prove`, with --model.path=FOLDER of its config.json while the model is not there yet"
        )
    recipe = read_recipe(config.run_file, list(overrides), verbs)
    stages = [recipe.stage(config.stage)] if config.stage else recipe.stages
    given = config.model_dump(exclude_unset=True, include=set(PlanSection.model_fields))
    made = [forecast(recipe, stage, given) for stage in stages]
    if as_json:
        print(json.dumps(made[0].as_dict()["plan"] if config.stage else description(made)))
    else:
        print_forecasts(made)
    return 0 if all(fits(one) for one in made) else 1


def forecasts(recipe: Plan) -> list[Forecast]:
    """Of all stages, in their order."""
    return [forecast(recipe, stage, {}) for stage in recipe.stages]


def forecast(recipe: Plan, stage: Stage, given: dict[str, Any]) -> Forecast:
    """Of one stage.

    Args:
        recipe: whose it is.
        stage: which.
        given: options of the command line, over those of the recipe.
    """
    schema = (TRAINING | SAMPLING).get(stage.verb)
    if schema is None:
        return Forecast(stage, None, "no GPU")
    options = stage.plan.model_copy(update=given)
    config: Any = validate(schema, resolve(stage.config, recipe.output) | {"output": "output"}, stage.name)
    try:
        if stage.verb in TRAINING:
            hf = _config(recipe, stage.config["model"]["path"])
            return Forecast(stage, plan(stage.verb, config, options, hf=hf))
        models = {name: (_config(recipe, path), section) for name, path, section in _sampled(stage, config)}
        return Forecast(stage, plan_served(models, options)) if models else Forecast(stage, None, "no GPU")
    except UserError as error:
        return Forecast(stage, None, str(error))


def fits(one: Forecast) -> bool:
    """Whether a stage can be run; one that has no plan for want of a `config.json` is not known to."""
    return one.why == "no GPU" or bool(one.made and not [each for each in one.made.findings if each.kind != "unwise"])


def description(made: Sequence[Forecast]) -> dict[str, Any]:
    """All of them for JSON; `parameters` are of the largest model that is trained."""
    trained = [one.made for one in made if isinstance(one.made, TrainingPlan)]
    return {
        "parameters": max((one.counts.main for one in trained), default=None),
        "gpus": max((one.made.all_gpus for one in made if one.made), default=None),
        "fits": all(fits(one) for one in made),
        "gpu_hours": _hours(made),
        "stages": [one.as_dict() for one in made],
    }


def print_forecasts(made: Sequence[Forecast]) -> None:
    """A table of all, then each one's arithmetic."""
    summary.print_table([(one.stage.name, one.stage.verb, one.made, one.why) for one in made])
    price = next((one.stage.plan.price for one in made if one.stage.plan.price), None)
    hours = _hours(made)
    print(f"all stages: {hours:,.0f} GPU-hours" + (f" = {hours * price:,.0f} at {price:g} each" if price else ""))


def _hours(made: Sequence[Forecast]) -> float:
    return sum(one.made.gpu_hours or 0.0 for one in made if one.made)


def _sampled(stage: Stage, config: Any) -> Iterator[tuple[str, str, RolloutSection]]:
    """Name, path as the recipe has it, and [rollout] of each model that a verb samples from."""
    if isinstance(config, CollectConfig | PreferencesConfig):
        for name, section in config.models.items():
            yield name, stage.config["models"][name]["path"], section.rollout
    elif isinstance(config, FilterConfig):
        if config.pass_rate:
            yield "model", stage.config["pass_rate"]["model"]["path"], config.pass_rate.rollout
    else:
        yield "model", stage.config["model"]["path"], config.rollout


def _config(recipe: Plan, text: str) -> HFConfig:
    """A model's `config.json`: its own, the one that [plan] names, or that of what its stage begins from."""
    own = Path(resolve(text, recipe.output))
    if (own / "config.json").exists():
        return read_config(own)
    if text in recipe.configs:
        return read_config(recipe.configs[text])
    if named := reference(text):
        stage = recipe.stage(named[0])
        before = stage.config.get("model", {}).get("path") or stage.config.get("source")
        if isinstance(before, str):
            return _as_written(stage, _config(recipe, before))
    raise ConfigError(
        f'no {own}/config.json yet: name a folder that has one in the recipe, [plan.models] "{text}" = "FOLDER"'
    )


def _as_written(stage: Stage, hf: HFConfig) -> HFConfig:
    """The `config.json` of a stage's result, quantised or not."""
    plain = {key: value for key, value in hf.items() if key != QUANTIZATION}
    if stage.verb == "quantize":
        return plain | {QUANTIZATION: {"quant_method": "modelopt"}}
    return plain | {QUANTIZATION: quantization_config()} if stage.config.get("dtype") == "fp8" else plain


def _is_recipe(path: Path) -> bool:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # the planner of run files says what is wrong with it
    return bool({"stages", "extends"} & tree.keys())
