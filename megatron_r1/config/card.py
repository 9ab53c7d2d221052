"""What a model card says that the checkpoint does not."""

from pathlib import Path

from megatron_r1.config.section import Section


class CardConfig(Section):
    """For the README.md of a Hugging Face folder."""

    name: str | None = None
    """Title of the model card. If not given: the output folder's name."""
    license: str | None = None
    """The model's license as the Hugging Face hub calls it (apache-2.0, mit). If not given: that of the source's own
    model card; without one the card says that there is none."""
    base_model: str | None = None
    """What the model was trained from: a name on the Hugging Face hub."""
    language: list[str] = []
    """ISO 639-1 code of a language of the model, such as en."""
    lineage: Path | None = None
    """`lineage.json` of the recipe's stage that made the model. If not given: the one in the source's folder or up to
    two above it."""
    results: list[Path] = []
    """`results.json` of `evaluate` or `lm-eval`. If not given: those of the recipe's stages that evaluated the
    model."""
