"""A recipe as a list of stages in the order they run in, with everything that can be wrong in it found.

The plan of a run lies in its output folder as `recipe.json`, for `megatron-r1 status` and for the report.
"""

import json
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from megatron_r1.config.load import validate
from megatron_r1.config.plan import PlanSection
from megatron_r1.config.recipe import RecipeConfig, ServiceSection, Tree
from megatron_r1.config.section import Section
from megatron_r1.data.files import write_json
from megatron_r1.errors import ConfigError, DataError, nearest

PLAN = "recipe.json"


class Verb(Protocol):
    """What a recipe has to know of a command."""

    @property
    def config(self) -> str:
        """Its config class, as `module:Name`."""

    @property
    def final(self) -> str:
        """The file, below its output folder, that it writes last."""


class Stage(Section):
    """One verb of the recipe, with its run file complete."""

    name: str
    verb: str
    final: str
    """See `Verb.final`."""
    settings: Tree
    """Its run file as the recipe says it, "@stage/..." included."""
    config: Tree
    """The same with all defaults."""
    needs: list[str]
    """Stages that come before it."""
    reads: list[str]
    """The "@stage/..." of its settings and of its services."""
    files: list[str]
    """What it reads that no stage makes."""
    services: list[str]
    plan: PlanSection = PlanSection()
    """What its plan has to know."""


class Plan(Section):
    """A recipe whose stages are in order."""

    title: str
    seed: int
    output: Path
    stages: list[Stage]
    services: dict[str, ServiceSection]
    models: dict[str, str]
    """Evaluated model -> the stage that evaluates it."""
    figures: dict[str, str]
    """As in `EvaluationSuite`."""
    planned: bool = False
    """Whether a dry run plans it: the recipe has a [plan]."""
    configs: dict[str, Path] = {}
    """Path of a model -> where its `config.json` lies before the model does."""

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ConfigError: there is none; the nearest is named.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise ConfigError(f"no stage {name!r}{nearest(name, names)}; there are {', '.join(names)}")

    def folder(self, stage: Stage) -> Path:
        """Where a stage's results lie."""
        return self.output / stage.name

    def depending_on(self, name: str) -> list[Stage]:
        """A stage and all that need it, however indirectly, in order."""
        found = {self.stage(name).name}
        for stage in self.stages:
            if found & set(stage.needs):
                found.add(stage.name)
        return [stage for stage in self.stages if stage.name in found]

    def save(self) -> None:
        """Write `<output>/recipe.json`."""
        write_json(self.output / PLAN, self.model_dump(mode="json", exclude={"output"}))

    @classmethod
    def read(cls, output: Path) -> "Plan":
        """The plan of an output folder, wherever that has been moved to.

        Raises:
            DataError: no recipe has run there.
        """
        file = output / PLAN
        if not file.exists():
            raise DataError(f"{output} is not the output folder of a recipe that has been run: it has no {PLAN}")
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            return validate(cls, tree | {"output": str(output.absolute())}, where=str(file))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{file} cannot be used ({error}); the recipe's `run` writes it anew") from error


def make_plan(config: RecipeConfig, output: Path, stages: list[Stage]) -> Plan:
    """Put stages in order.

    Raises:
        ConfigError: stages that need each other in a circle.
    """
    suite = config.evaluation
    return Plan(
        title=config.title,
        seed=config.seed,
        output=output,
        stages=in_order(stages),
        services=config.services,
        models={name: evaluation_stage(name) for name in suite.models} if suite else {},
        figures=suite.figures if suite else {},
        planned=config.plan is not None,
        configs=config.plan.models if config.plan else {},
    )


def evaluation_stage(model: str) -> str:
    """Name of the stage that evaluates a model."""
    return f"evaluate_{model}"


def in_order(stages: list[Stage]) -> list[Stage]:
    """Each stage after those it needs; where that leaves a choice, in the given order.

    Raises:
        ConfigError: stages that need each other in a circle.
    """
    try:
        TopologicalSorter({stage.name: stage.needs for stage in stages}).prepare()
    except CycleError as error:
        circle = error.args[1]
        edges = [f"{later} needs {earlier}" for earlier, later in pairwise(circle)]
        raise ConfigError(
            f"the stages {' -> '.join(circle)} form a circle, so none can be first: {', '.join(edges)}; "
            'remove one of these, a "@stage/..." or an entry of `needs`'
        ) from error
    left, done, ordered = list(stages), set[str](), list[Stage]()
    while left:
        ready = next(stage for stage in left if done.issuperset(stage.needs))
        left.remove(ready)
        done.add(ready.name)
        ordered.append(ready)
    return ordered
