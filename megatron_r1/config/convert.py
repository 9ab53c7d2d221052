"""What `import`, `export` and `cast` take: a checkpoint, where to write another one, and in which numbers."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, PositiveInt

from megatron_r1.config.card import CardConfig
from megatron_r1.config.section import Section

Float = Literal["bfloat16", "float16", "float32"]
MOST_WORKERS = 8


def default_workers() -> int:
    """One for each core that this process may use, at most `MOST_WORKERS`: more than that only queue for the disk."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


STAGE_ONLY: dict[str, JsonValue] = {"option": False}
"""Of a field that is a key of a recipe's stage and no option of the command line, where it would say nothing."""


class ConvertConfig(Section):
    """What the three have in common."""

    source: Path
    """The checkpoint that is read; it is never written to."""
    output: Path
    """The folder that is made. It must not exist, or be empty."""
    folder: str = Field(default="", json_schema_extra=STAGE_ONLY)
    """The model's folder below `output`, for a stage of a recipe, which keeps its records in `output` (say "hf");
    empty = `output` itself."""
    mtp: bool = True
    """Convert the multi-token-prediction layers too. Switched off (`mtp = false`, `--no-mtp`), they are left out, and
    the source need not have them."""
    workers: PositiveInt = Field(default_factory=default_workers)
    """Threads: one for each core, at most 8, if not given. The result does not depend on their number."""
    dry_run: bool = False
    """Check everything, say what would be written and what it takes, and stop."""


class ImportConfig(ConvertConfig):
    """`megatron-r1 import`: anything -> Megatron's distributed checkpoint."""

    config: Path | None = None
    """Hugging Face folder whose `config.json` and tokenizer the model gets, for a source without its own."""
    dtype: Float | None = None
    """Numbers of the result. If not given, tensors stay as they are stored, and FP8 becomes bfloat16. What a family
    keeps in float32 stays so."""


class HuggingFaceConfig(CardConfig, ConvertConfig):
    """What is written as a Hugging Face folder."""

    scale_format: Literal["float32", "ue8m0"] = "float32"
    """Scales of FP8 blocks: "ue8m0" rounds them up to powers of two, still stored in float32."""
    max_shard_bytes: Annotated[int, Field(gt=0)] = 5_000_000_000
    """Bytes of a safetensors file at most; a tensor that is larger has a file of its own."""


class ExportConfig(HuggingFaceConfig):
    """`megatron-r1 export`: Megatron's checkpoint -> a Hugging Face folder."""

    config: Path | None = None
    """Hugging Face folder whose `config.json` and tokenizer the model gets, for a source without its own."""
    dtype: Float | Literal["fp8"] | None = None
    """Numbers of the result: "fp8" stands for DeepSeek's blocks of 128 x 128 in the linear layers and bfloat16 in the
    rest. If not given, tensors stay as they are stored."""


class CastConfig(HuggingFaceConfig):
    """`megatron-r1 cast`: a Hugging Face folder or a GGUF file -> a Hugging Face folder in other numbers."""

    dtype: Float | Literal["fp8"] = "bfloat16"
    """Numbers of the result: "fp8" stands for DeepSeek's blocks of 128 x 128 in the linear layers and bfloat16 in the
    rest."""
