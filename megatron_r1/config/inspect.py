"""Configs of `inspect` and `verify`, and of the model card of an exported folder."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from megatron_r1.config.convert import default_workers
from megatron_r1.config.section import Section


class InspectConfig(Section):
    """`megatron-r1 inspect`: what a checkpoint is, from its headers; no tensor is read."""

    path: Path
    """A Hugging Face folder (its config.json alone is enough), a Megatron distributed checkpoint, a training
    checkpoint `step_XXXXXXXX`, or a GGUF file."""
    config: Path | None = None
    """Hugging Face folder whose config.json and tokenizer belong to a Megatron checkpoint without its own."""
    mtp: bool = True
    """False = a Megatron checkpoint lacks the multi-token-prediction layers of its config.json, as a policy's does."""
    tensors: bool = False
    """List every tensor."""
    check: bool = False
    """Compare every shape with the one that config.json makes. Builds the model without memory for its weights, which
    takes about 15 s at 671 billion parameters."""


class VerifyConfig(Section):
    """`megatron-r1 verify`: whether two checkpoints, in whatever formats, hold the same tensors."""

    a: Path
    b: Path
    config: Path | None = None
    """Hugging Face folder whose config.json and tokenizer belong to Megatron checkpoints without their own."""
    mtp: bool = True
    """False = without the multi-token-prediction layers, which a training checkpoint of a policy does not hold."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Two tensors are close if the norm of their difference is at most this share of the norm of the first: 0.04 for
    bfloat16 against its FP8 blocks. 0 = they have to be equal bit for bit."""
    stored: bool = False
    """Compare two Hugging Face folders tensor by tensor as they stand in the files: scales and second copies too, FP8
    weights not dequantised."""
    text: Path | None = None
    """UTF-8 file: also compare the logits of both models on it."""
    text_tokens: PositiveInt = 2048
    """Most tokens that are read of it."""
    text_length: PositiveInt = 512
    """Tokens of a sequence; the text is cut into as many."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """What both models compute in."""
    workers: PositiveInt = Field(default_factory=default_workers)
    """Rules whose tensors are read at once, as far as 2 GiB hold them."""
    output: Path | None = None
    """Folder for `summary.json`; a recipe sets it."""


class CardSection(Section):
    """[card]: what the model card says that the checkpoint does not."""

    name: str | None = None
    """Title. Default: the name of the folder, or of the recipe's stage."""
    license: str | None = None
    """Identifier as on the Hugging Face hub: apache-2.0, mit. Default: the card says that none was given."""
    base_model: str | None = None
    """What was trained: a name on the Hugging Face hub."""
    language: list[str] = []
    """ISO 639-1 codes."""
    lineage: Path | None = None
    """`lineage.json` of the recipe's stage that made the model. Default: the one beside the folder, if there is one."""
    results: list[Path] = []
    """Each a `results.json` of `evaluate` or `lm-eval`. Default: of the recipe's stages that evaluated the model."""
