"""Run file of `data generate`."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from megatron_r1.config.component import complete
from megatron_r1.config.load import validate
from megatron_r1.config.section import Component, Section
from megatron_r1.config.sections import TaskSection

SHARE = "share"
"""Key of a source's section that is the corpus's, not the source's."""
_FLAT = ("task", "template", "quality")
"""Keys of the one source `worked`, as a run file without [sources] has them."""


class Shared(Section):
    """What the corpus reads of a source's section."""

    share: NonNegativeFloat = 1.0


def split(section: dict[str, Any]) -> tuple[float, Component]:
    """Share and component of a section of [sources]."""
    own = {key: value for key, value in section.items() if key != SHARE}
    share = {SHARE: section[SHARE]} if SHARE in section else {}
    return validate(Shared, share, where="a source").share, own


def _complete(section: dict[str, Any]) -> dict[str, Any]:
    share, own = split(section)
    return {SHARE: share, **complete("source", own, default="worked")}


SourceComponent = Annotated[dict[str, Any], AfterValidator(_complete)]


class GenerateConfig(Section):
    """`megatron-r1 data generate`: text documents to pretrain a base model on.

    `task`, `template` and `quality` at the top of a file without [sources] are those of its one source, `worked`.
    """

    output: Path
    """Folder for `train.jsonl` and `validation.jsonl`."""
    sources: dict[str, SourceComponent] = Field(min_length=1)
    """Name -> what writes the documents; each has `type`, an optional `share` of the documents (1.0; shares are
    normalised) and the source's own keys."""
    documents: PositiveInt
    validation_documents: PositiveInt = 256
    heldout: TaskSection | None = None
    heldout_questions: NonNegativeInt = 0
    """The first this many questions of [heldout] are kept out of the corpus."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, tree: dict[str, Any]) -> dict[str, Any]:
        flat = {key: tree[key] for key in _FLAT if key in tree}
        if not flat:
            return tree
        if "sources" in tree:
            raise ValueError(f"{', '.join(flat)} stand beside [sources]: write them into a section of it")
        return {**{key: value for key, value in tree.items() if key not in _FLAT}, "sources": {"worked": flat}}
