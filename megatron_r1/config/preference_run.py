"""What the verbs that learn from preferences, `reward-model` and `dpo`, have in common."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.guard import GuardSection
from megatron_r1.config.section import Section
from megatron_r1.config.sections import OptimSection, ParallelSection, PolicySection, ReportSection


class PreferenceRunConfig(Section):
    """Preferences in, steps over them, a Hugging Face folder out."""

    output: Path
    model: PolicySection
    """What training starts from. Its MTP layers are not trained: they would learn rejected responses too."""
    tokenizer: Path | None = None
    """Default: the model folder."""
    data: Annotated[list[Path], Field(min_length=1)]
    """JSONL files: pairs (`prompt`, `chosen`, `rejected`) or labels (`prompt`, `response`, `label`)."""
    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the prompts whose rows are not trained on but measured, before and after."""
    max_length: PositiveInt = 8192
    """Tokens of the longest prompt with response; longer rows are left out and counted."""
    epochs: PositiveInt = 1
    batch: PositiveInt
    """Pairs or labels of one optimizer step, over all ranks; the last step of an epoch has what is left."""
    tokens_per_microbatch: PositiveInt = 16384
    """Packed tokens of one forward pass on one rank; a longer pair gets a pass of its own."""
    optim: OptimSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection(every=50)
    guard: GuardSection = GuardSection()
    report: ReportSection = ReportSection()
    seed: int = 0
