"""Run file of `sft`: prompts with the responses that a model is to give to them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.guard import GuardSection
from megatron_r1.config.section import Section
from megatron_r1.config.sections import (
    OptimSection,
    ParallelSection,
    PolicySection,
    ReportSection,
)


class ChatsSection(Section):
    """One entry of `data`: rows of `prompt` and `response`, or of `messages`. A bare path is `{ path = ... }`."""

    path: str
    """`chats.jsonl`, `chats.parquet`, `./folder` or a hub id, as `source` of `data/records.py`."""
    weight: PositiveFloat = 1.0
    """How often an epoch passes over its rows: 2 = each twice, 0.5 = half of them, another half each epoch."""
    name: str | None = None
    """A dataset's configuration, where it has several."""
    split: str | None = None
    """A dataset's split; None = `train`."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    columns: dict[str, str] = {}
    """`prompt`, `response`, `messages` or `domain` -> the column that holds it, where the names differ."""
    where: dict[str, str | int | float | bool | list[str | int | float | bool]] = {}
    """Column -> the value, or the list of values, that a row must have there."""


def _entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Chats = Annotated[ChatsSection, BeforeValidator(_entry)]


class ValidationSection(Section):
    """[validation] of `sft`: rows that are not trained on."""

    data: list[Chats] = []
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts of `data` that is held out, chosen by their text: all responses to a prompt, in any order of
    rows and with any seed."""
    every: PositiveInt | None = None
    """Steps between evaluations; the first and the last model are always evaluated."""


class SFTOptimSection(OptimSection):
    """[optim] of `sft`: the schedule of DeepSeek-R1's supervised stages (arXiv 2501.12948v2, B.4.2)."""

    lr: PositiveFloat = 5e-5
    min_lr: NonNegativeFloat = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "cosine"


class SFTConfig(Section):
    """`megatron-r1 sft`: supervised fine-tuning; batch, length and epochs are those of DeepSeek-R1."""

    output: Path
    model: PolicySection
    tokenizer: Path | None = None
    """Default: the model folder."""
    data: list[Chats] = Field(min_length=1)
    """Files, folders or data sets: paths, or `{ path = ..., weight = ... }`."""
    validation: ValidationSection = ValidationSection()
    epochs: PositiveInt = 2
    batch: PositiveInt = 128
    """Sequences of one optimizer step, over all ranks; the last step of a run takes what is left."""
    max_length: PositiveInt = 32768
    """Prompt, response and end-of-sequence, tokens. A longer row is left out, never cut, and counted."""
    tokens_per_microbatch: PositiveInt = 16384
    """Packed tokens of one forward pass on one rank; a longer single sequence gets a pass of its own."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """What to do about rows that nothing should be learned from: an empty response, unbalanced <think> tags, a begin-
    or end-of-sequence token inside. "drop" leaves them out and counts them."""
    optim: SFTOptimSection = SFTOptimSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection(every=100)
    guard: GuardSection = GuardSection()
    report: ReportSection = ReportSection()
    seed: int = 0
