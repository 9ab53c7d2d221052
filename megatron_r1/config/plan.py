"""[plan] of a recipe and options of `megatron-r1 plan`: what run files do not say."""

from pathlib import Path

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_r1.config.section import Section


class PlanSection(Section):
    """[stages.NAME.plan]: how many GPUs, and what the data are like. All else is in the run file."""

    gpus: PositiveInt | None = None
    """All processes of the trainer. If not given: the fewest that [parallel] needs."""
    mean_tokens: PositiveInt | None = None
    """Mean length of a sample, prompt included. If not given: a quarter of the longest."""
    spread: NonNegativeFloat = 0.7
    """Standard deviation of the logarithm of a response's length."""
    samples: PositiveInt | None = None
    """Rows that sft, reward-model and dpo have, or samples that other verbs draw. If not given, there is no total."""
    price: PositiveFloat | None = None
    """Of a GPU for an hour."""


class RecipePlanSection(PlanSection):
    """[plan]: for all stages; a stage's own `plan` is laid over it."""

    models: dict[str, Path] = {}
    """Path of a model that may not be there yet -> a folder with its `config.json`, which is all that a plan reads."""


class PlanConfig(PlanSection):
    """`megatron-r1 plan run.toml` or `recipe.toml`."""

    run_file: Path
    """A run file of pretrain, sft, rl, reward-model or dpo, or a recipe, all stages of which are planned."""
    stage: str | None = None
    """Of a recipe, this stage alone."""
    search: bool = False
    """Rank the layouts of so many GPUs that fit into memory by the predicted time of a step."""
    prove: bool = False
    """Build the real modules of every distinct rank on the meta device and compare bytes."""
    html: Path | None = None
    """Write the plan as a page."""
