"""Run file of `preferences`: responses compared or labelled by a judge, for reward models and for DPO."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.chat_endpoint import PromptedEndpointSection
from megatron_r1.config.collect import ExcludedSection, SampledModelSection
from megatron_r1.config.conversation import check_tools
from megatron_r1.config.section import Section
from megatron_r1.config.sections import TaskSection


class VotingJudgeSection(PromptedEndpointSection):
    """[judge]: asked several times about the same, so it has to sample."""

    temperature: NonNegativeFloat = 0.7


class PreferencesConfig(Section):
    """`megatron-r1 preferences`: pairs for a pairwise reward model or DPO, or labels for a pointwise reward model.

    The defaults are those of DeepSeek-R1's helpful reward model (pairs: four queries, margin 1, lengths balanced).
    """

    output: Path
    """Folder for `pairs.jsonl` or `labels.jsonl`, `dropped.jsonl` and `summary.json`; a killed run goes on from it."""
    kind: Literal["pairs", "labels"]
    """`pairs`: which of two responses is better; `labels`: is a response safe."""
    part: Literal["summary", "response"] | None = None
    """What the judge is shown: what follows the reasoning, or all. Default: the summary of pairs, the whole response
    for labels, as R1's reward models have it."""
    data: TaskSection
    """Where prompts come from."""
    questions: PositiveInt | None = None
    """How many different prompts. Default: all that the task has."""
    exclude: dict[str, ExcludedSection] = {}
    """Name -> held-out questions, which are not asked."""
    models: dict[str, SampledModelSection] = Field(min_length=1)
    """Name -> model that responds. Those of several models are compared with each other, too."""
    samples: PositiveInt = 2
    """Responses of each model to a prompt."""
    batch: PositiveInt = 128
    """Prompts that are sampled together; a run that is killed while sampling loses the batch that it was at."""
    judge: VotingJudgeSection
    votes: PositiveInt = 4
    """Times that the judge is asked about a pair (half of them with the responses exchanged) or about a response."""
    pairs_per_question: PositiveInt | None = None
    """Pairs of responses to a prompt that are compared, drawn by the seed; None = all."""
    margin: NonNegativeFloat = 1.0
    """A pair is kept if its mean score is farther than this from 0; verdicts score 2, 1, 0, -1 and -2."""
    length_tolerance: PositiveFloat | None = 0.05
    """Pairs are left out until the mean lengths of the chosen and of the rejected differ by at most this share of their
    mean; None = lengths are not balanced."""
    agreement: Annotated[float, Field(gt=0.5, le=1)] = 0.75
    """Least share of the votes that a label needs."""
    seed: int = 0

    @model_validator(mode="after")
    def _without_tools(self) -> "PreferencesConfig":
        check_tools(None, {"data": self.data})
        return self

    @property
    def judged(self) -> Literal["summary", "response"]:
        """The part that the judge is shown."""
        return self.part or ("summary" if self.kind == "pairs" else "response")

    @model_validator(mode="after")
    def _comparable(self) -> "PreferencesConfig":
        if self.kind == "pairs" and self.votes % 2:
            raise ValueError(f"votes {self.votes}: half of them exchange the responses, so an even number is needed")
        if self.kind == "pairs" and self.samples * len(self.models) < 2:
            raise ValueError("samples 1 of one model makes no pair: set `samples` to 2 or more, or name two models")
        return self
