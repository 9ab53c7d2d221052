"""What `quantize` takes: a Hugging Face folder, where to write it in fewer bits, what to calibrate and train with."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

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
    heldout: Path | None = None
    """Text as for `calibration`. The summary then tells its mean loss, nats a token: of the source, quantised, and
    after `finetune`."""
    finetune: Path | None = None
    """Quantisation-aware training: text as for `calibration`, best the model's own answers, on which the rounded model
    is trained before it is written. It takes 16 bytes a parameter."""
    finetune_steps: PositiveInt = 200
    """Updates; the rate falls linearly to 0."""
    finetune_batch: PositiveInt = 8
    """Documents of an update."""
    finetune_lr: PositiveFloat = 1e-5
    """Learning rate of the first update."""
    seed: int = 0
    """Of the order of `finetune`."""
