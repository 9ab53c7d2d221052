"""Recipe files of `megatron-r1 run`: verbs as stages of one graph, what they share, and what is evaluated."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, PositiveFloat

from megatron_r1.config.plan import PlanSection, RecipePlanSection
from megatron_r1.config.section import Section

Tree = dict[str, Any]
"""Tables and values of a run file."""


class OpenSection(Section):
    """A section whose own keys are the recipe's; every other key belongs to the verb's run file."""

    model_config = ConfigDict(extra="allow")

    file: Path | None = None
    """A run file that the section's other keys are laid over; relative to the recipe file."""
    use: list[str] = []
    """Names of [common]: laid over `file` in this order, under the section's own keys."""
    services: list[str] = []
    """Names of [services] that have to be running."""
    needs: list[str] = []
    """Stages that come first, besides those whose results the section names as "@stage/..."."""
    plan: PlanSection | None = None
    """What the stage's plan has to know, over [plan]."""

    def own(self) -> Tree:
        """The verb's keys."""
        return dict(self.model_extra or {})


class StageSection(OpenSection):
    """[stages.NAME]."""

    verb: str = ""
    """As on the command line: "rl", "data generate"."""


class EvaluationModel(Section):
    """[evaluation.models.NAME]: a model to evaluate; the other keys are laid over those of [evaluation]."""

    model_config = ConfigDict(extra="allow")

    path: str
    """A Hugging Face folder: "@base/hf" or one outside the recipe."""


class EvaluationSuite(OpenSection):
    """[evaluation]: a run file of `evaluate`, run for each of its models as the stage `evaluate_NAME`."""

    models: dict[str, EvaluationModel] = Field(min_length=1)
    figures: dict[str, str] = {}
    """Figure of the recipe's summary.json -> where it stands in results.json: "tasks.sums.pass@1"."""


class ServiceSection(Section):
    """[services.NAME]: a server that stages need, such as a judge."""

    command: list[str] = Field(min_length=1)
    """Program and arguments; the program "python" is the Python that runs the recipe. "@stage/..." as in a stage."""
    ready: str
    """A URL that answers with success once the service can be used."""
    timeout: PositiveFloat = 120.0
    """Seconds until then."""


class RecipeConfig(Section):
    """A whole recipe."""

    extends: str | None = None
    """Another recipe in the same folder, which this one is laid over."""
    output: Path
    """Folder for everything: `<output>/<stage>/` for each stage, `summary.json`, `logs/`, `superseded/`."""
    title: str = ""
    seed: int = 0
    """Of every stage that sets none itself (a `file` does not count)."""
    common: dict[str, Tree] = {}
    """Name -> keys that several stages `use`."""
    stages: dict[str, StageSection] = Field(min_length=1)
    services: dict[str, ServiceSection] = {}
    evaluation: EvaluationSuite | None = None
    plan: RecipePlanSection | None = None
    """With it `--dry-run` plans every stage: memory, time, cost (docs/planner.md)."""
