"""What `inspect` and `verify` take."""

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
    """Expect the multi-token-prediction layers of config.json in a Megatron checkpoint. Switched off (`mtp = false`,
    `--no-mtp`), it may lack them, as a policy's does."""
    tensors: bool = False
    """List every tensor."""
    check: bool = False
    """Compare every shape with the one that config.json makes. Builds the model without memory for its weights, which
    takes about 15 s at 671 billion parameters. Of a training checkpoint every file is read, too, and compared with the
    checksum that its manifest.json has of it."""


class VerifyConfig(Section):
    """`megatron-r1 verify`: whether two checkpoints, in whatever formats, hold the same tensors."""

    a: Path
    """A checkpoint: a Hugging Face folder, a Megatron checkpoint or a GGUF file."""
    b: Path
    """Another one; it may be of another format."""
    config: Path | None = None
    """Hugging Face folder whose config.json and tokenizer belong to Megatron checkpoints without their own."""
    mtp: bool = True
    """Compare the multi-token-prediction layers too. Switched off (`mtp = false`, `--no-mtp`), they are ignored: a
    training checkpoint of a policy does not hold them."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Accept tensors whose difference has at most this share of the first one's norm: 0.04 for bfloat16 against its FP8
    blocks, 0.004 for float32 against bfloat16. With 0 they have to be equal bit for bit."""
    stored: bool = False
    """Compare two Hugging Face folders tensor by tensor as they stand in the files: scales and second copies too, FP8
    weights not dequantised."""
    text: Path | None = None
    """UTF-8 text file: run both models on it, one after the other, and compare their logits. Each has to fit into
    memory."""
    text_tokens: PositiveInt = 2048
    """Tokens of the text that are read at most."""
    text_length: PositiveInt = 512
    """Tokens of a sequence that the text is cut into."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that both models compute in."""
    workers: PositiveInt = Field(default_factory=default_workers)
    """Threads: one for each core, at most 8, if not given. They share 2 GiB."""
    output: Path | None = None
    """Folder that the result is also written to, as `summary.json`."""
