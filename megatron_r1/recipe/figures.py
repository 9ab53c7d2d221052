"""The figures of a whole recipe: one entry for each evaluated model, one for each stage."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.errors import nearest
from megatron_r1.recipe.plan import Plan
from megatron_r1.recipe.record import Record, read_lineage
from megatron_r1.report.recipe_page import ModelState, RecipeState, StageState
from megatron_r1.report.summary import flatten


def summarize(plan: Plan, states: Mapping[str, str]) -> dict[str, Any]:
    """What `<output>/summary.json` holds.

    Returns:
        `title`, `seed`; `models`: name -> figure -> value, None where the results lack it; `stages`: name -> `verb`,
        `state`, `seconds` of all its attempts, and the figures of the model that it made, if that is evaluated;
        `seconds`, their sum.
    """
    stages = {stage.name: _stage(plan, stage.name, stage.verb, states[stage.name]) for stage in plan.stages}
    models = {model: model_figures(plan, name) for model, name in plan.models.items()}
    for model, figures in models.items():
        if maker := made_by(plan, model):
            stages[maker] |= figures
    return {
        "title": plan.title,
        "seed": plan.seed,
        "models": models,
        "stages": stages,
        "seconds": round(sum(stage["seconds"] or 0.0 for stage in stages.values()), 3),
    }


def made_by(plan: Plan, model: str) -> str | None:
    """The stage that made a model; None for one from outside of the recipe."""
    evaluation = plan.stage(plan.models[model])
    path = evaluation.settings.get("model", {}).get("path", "")
    return next((name for name in evaluation.needs if path.startswith(f"@{name}/") or path == f"@{name}"), None)


def page_state(plan: Plan, summary: Mapping[str, Any]) -> RecipeState:
    """A recipe as its report shows it."""
    states = {"ran": "done", "unchanged": "done", "not run": "waiting", "waits": "waiting", "out of date": "waiting"}
    return RecipeState(
        title=plan.title or plan.output.name,
        stages=[
            StageState(
                stage.name,
                stage.verb,
                stage.needs,
                states.get(summary["stages"][stage.name]["state"], summary["stages"][stage.name]["state"]),
                summary["stages"][stage.name]["seconds"],
            )
            for stage in plan.stages
        ],
        models=[
            ModelState(model, stage, made_by(plan, model), summary["models"][model])
            for model, stage in plan.models.items()
        ],
        figures=list(plan.figures),
    )


def model_figures(plan: Plan, stage: str) -> dict[str, Any]:
    """The recipe's figures from the results of one evaluation; None where they are missing."""
    results = final_figures(plan, stage)
    return {figure: look_up(results, path) for figure, path in plan.figures.items()}


def final_figures(plan: Plan, name: str) -> dict[str, Any]:
    """What a finished stage wrote last; empty if it has not finished, or if that has been removed or damaged since."""
    stage = plan.stage(name)
    folder = plan.folder(stage)
    if read_lineage(folder) is None:
        return {}
    try:
        return dict(json.loads((folder / stage.final).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # the stage then stands as out of date, which is told


def look_up(tree: Any, path: str) -> Any:
    """The value at a dotted path, in a list by its number; None if there is none or it is a table."""
    for part in path.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return None if isinstance(tree, dict | list) else tree


def unmatched(plan: Plan) -> list[str]:
    """For each figure that no finished evaluation has: a line for people, with the nearest that there is."""
    results = [final_figures(plan, name) for name in plan.models.values()]
    known = {path for figures in results for path in flatten(figures)}
    return [
        f"figure {figure!r}: no evaluation has {path!r}{nearest(path, known)}"
        for figure, path in plan.figures.items()
        if known and path not in known and all(look_up(figures, path) is None for figures in results)
    ]


def _stage(plan: Plan, name: str, verb: str, state: str) -> dict[str, Any]:
    record = Record.read(plan.output / name) if Path(plan.output / name).exists() else None
    return {"verb": verb, "state": state, "seconds": record.seconds if record else None}
