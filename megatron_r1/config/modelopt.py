"""What `quantize` takes: a Hugging Face folder, where to write it again in fewer bits, and what to calibrate with."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from megatron_r1.config.card import CardConfig
from megatron_r1.config.convert import STAGE_ONLY


class QuantizeConfig(CardConfig):
    """NVIDIA's unified Hugging Face format, by nvidia-modelopt."""

    source: Path
    """A Hugging Face folder in bfloat16, float16 or float32; it is never written to."""
    output: Path
    """The folder that is made. It must not exist, or be empty."""
    folder: str = Field(default="", json_schema_extra=STAGE_ONLY)
    """The model's folder below `output`, for a stage of a recipe, which keeps its records in `output` (say "hf");
    empty = `output` itself."""
    format: Literal["fp8", "fp8_block", "nvfp4", "int4_awq"]
    """Numbers of the result. "fp8": e4m3, one scale for each tensor, weights and activations. "fp8_block": e4m3
    weights in blocks of 128 x 128. "nvfp4": e2m1 in blocks of 16 with e4m3 scales, weights and activations. "int4_awq":
    4-bit weights in blocks of 128, by activation-aware scaling (arXiv 2306.00978)."""
    calibration: Path | None = None
    """Text to measure activations on: a JSONL file with `text` in each line, best of the kind that the model will read,
    prompts with its answers. Only "fp8_block" needs none."""
    samples: PositiveInt = 512
    """Documents of the calibration text that are read, from the beginning."""
    length: PositiveInt = 2048
    """Tokens of a document that are read at most."""
