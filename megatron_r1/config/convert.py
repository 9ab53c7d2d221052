"""What `import`, `export` and `cast` take: a checkpoint, where to write another one, and in which numbers."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from megatron_r1.config.section import Section

Float = Literal["bfloat16", "float16", "float32"]
MOST_WORKERS = 8


def default_workers() -> int:
    """One for each core that this process may use, at most `MOST_WORKERS`: more than that only queue for the disk."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


class ConvertConfig(Section):
    """What the three have in common."""

    source: Path
    """The checkpoint that is read; it is never written to."""
    output: Path
    """The folder that is made. It must not exist, or be empty."""
    folder: str = ""
    """The model's folder below `output`, for a stage of a recipe, which keeps its records in `output` (say "hf");
    empty = `output` itself."""
    mtp: bool = True
    """False = without the multi-token-prediction layers."""
    workers: PositiveInt = Field(default_factory=default_workers)
    """Threads. The result does not depend on their number."""
    dry_run: bool = False
    """Check everything, say what would be written and what it takes, and stop."""


class ImportConfig(ConvertConfig):
    """`megatron-r1 import`: anything -> Megatron's distributed checkpoint."""

    config: Path | None = None
    """A Hugging Face folder whose `config.json` and tokenizer the model gets, where the source has none."""
    dtype: Float | None = None
    """None = as stored; FP8 becomes bfloat16. What a family keeps in float32 stays so."""


class HuggingFaceConfig(ConvertConfig):
    """What is written as a Hugging Face folder."""

    scale_format: Literal["float32", "ue8m0"] = "float32"
    """Of FP8's scales; "ue8m0" rounds them up to powers of two."""
    max_shard_bytes: Annotated[int, Field(gt=0)] = 5_000_000_000
    """Size of a safetensors file; a tensor that is larger has a file of its own."""


class ExportConfig(HuggingFaceConfig):
    """`megatron-r1 export`: Megatron's checkpoint -> a Hugging Face folder."""

    config: Path | None = None
    """A Hugging Face folder whose `config.json` and tokenizer the model gets, where the source has none."""
    dtype: Float | Literal["fp8"] | None = None
    """None = as stored. "fp8" = DeepSeek's blocks of 128 x 128 for the linear layers, bfloat16 for the rest."""


class CastConfig(HuggingFaceConfig):
    """`megatron-r1 cast`: a Hugging Face folder -> one in other numbers."""

    dtype: Float | Literal["fp8"] = "bfloat16"
    """"fp8" = DeepSeek's blocks of 128 x 128 for the linear layers, bfloat16 for the rest."""
