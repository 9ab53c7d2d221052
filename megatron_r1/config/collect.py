"""Run file of `collect`: responses of models, or ready ones, made into a data set for supervised fine-tuning."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megatron_r1.config.component import RewardComponent, TaskComponent
from megatron_r1.config.conversation import check_tools
from megatron_r1.config.evaluation import NucleusSection, SamplingSection, ServedModelSection, rewards_of_the_data
from megatron_r1.config.evaluation_set import EvaluationSetSection
from megatron_r1.config.records import RecordsSection
from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.config.section import Section
from megatron_r1.config.sections import TaskSection
from megatron_r1.errors import nearest

Share = Annotated[float, Field(ge=0, le=1)]


class SampledModelSection(ServedModelSection):
    """[models.NAME]: a model that sources and rewriting name; its engines serve all of these."""

    tokenizer: Path | None = None
    """Default: the model folder."""
    rollout: NucleusSection


class DrawSection(Section):
    """How a model of [models] is sampled; None = as its own [rollout] says."""

    model: str
    """Name in [models]."""
    temperature: NonNegativeFloat | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None
    batch: PositiveInt = 128
    """Prompts that are sampled together; a run that is killed loses the batch that it was at."""

    def sampling(self, model: SampledModelSection, **options: Any) -> SamplingSection:
        """The section that a sampler takes."""
        own = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        changed = {key: value for key, value in own.items() if value is not None}
        return SamplingSection(
            model=ServedModelSection(path=model.path, dtype=model.dtype),
            tokenizer=model.tokenizer,
            rollout=NucleusSection.model_validate(model.rollout.model_dump() | changed),
            batch=self.batch,
            **options,
        )


class ExamplesSection(RecordsSection):
    """[sources.NAME.examples]: worked examples before each question; fields `question` and `response`."""

    count: PositiveInt = 3
    """Of each prompt; drawn anew for every question."""
    separator: str = "\n\n"
    """Behind each example, which is the question in the source's template and then its response."""


class MixedLanguageSection(Section):
    """Drops reasoning with too many words of other languages than its target (`reward/language_consistency.py`)."""

    min_share: Share = 0.95
    """Least share of words in the target language."""
    language: str | None = None
    """ISO 639-1 code; None = the question's own language, or the main one of the reasoning where that has none."""


class LongParagraphsSection(Section):
    """Drops reasoning with a paragraph, what stands between two line breaks, that is too long."""

    max_characters: PositiveInt = 2000


class RepetitionSection(Section):
    """Drops responses that repeat themselves (`reward/repetition_penalty.py` says what a word is)."""

    ngram: PositiveInt = 10
    """Words. Long reasoning comes back to short phrases all the time; three words would drop honest ones."""
    max_share: Share = 0.2
    """Largest share of n-grams that have stood before."""


class ResponseLengthSection(Section):
    """Drops responses out of bounds, both included, in tokens of the model that wrote them."""

    min_tokens: PositiveInt = 1
    max_tokens: PositiveInt | None = None


class FiltersSection(Section):
    """[filters]: what a response must not have. Filters of the reasoning let responses without any pass."""

    truncated: bool = True
    """Drop what was cut at the length limit."""
    broken_characters: bool = True
    """Drop what holds replacement characters (U+FFFD, from tokens that are no text) or control characters."""
    well_formed: Literal["tags", "after_think"] | None = None
    """Drop what is not one block of reasoning and then one `<answer>` block (`tags`) or free text (`after_think`)."""
    length: ResponseLengthSection | None = None
    code_blocks: bool = False
    """Drop reasoning with fenced blocks of code."""
    long_paragraphs: LongParagraphsSection | None = None
    repetition: RepetitionSection | None = None
    mixed_language: MixedLanguageSection | None = None


class RewriteSection(DrawSection):
    """[sources.NAME.rewrite]: a model turns what was kept into another form, which is judged and filtered again."""

    prompt: Path
    """File with what the model is asked; its placeholders are those of `response` of a source, and {question}."""
    form: str = "{text}"
    """The new response: {text} is what the model wrote, the other placeholders are the old response's. A summary for
    reasoning that stays: `<think>{reasoning}</think>\\n{text}`; reasoning for an answer that stays:
    `<think>{text}</think>\\n{response}`."""
    attempts: PositiveInt = 1
    """Times that each response is rewritten; the first that passes is taken."""
    share: Share = 1.0
    """How many of the responses are rewritten, drawn by the seed; the others stay as they are."""
    rewards: dict[str, RewardComponent] = {}
    """What judges the new response, in the form in which the row is stored. Default: the source's own."""
    filters: FiltersSection | None = None
    """Default: the source's own."""


class SourceSection(Section):
    """What all kinds of sources have."""

    domain: str | None = None
    """Row of the table by domain. Default: the member's name in a mixture, else the type of the task."""
    filters: FiltersSection | None = None
    prompt_template: str | None = None
    """Template of the stored prompt, by name or as text with {question}. Default: the one that was sampled with, but
    without examples."""
    response: str = "{response}"
    """The stored response, from what was sampled: {reasoning}, {summary} (what follows it, without tags), {answer} (its
    final answer), {reference} (the right one), {question}, {response} (all of it). A response that lacks a part that is
    named here is dropped. An opening `<think>` that the stored prompt ends in is left out."""
    rewrite: RewriteSection | None = None
    limit: PositiveInt | None = None
    """Most rows of the final mix; drawn by the seed."""
    share: PositiveFloat | None = None
    """Weight in the final mix; either all sources have one or none. The mix is as large as the scarcest allows."""


class SampleSource(SourceSection, DrawSection):
    """[sources.NAME] with `kind = "sample"`: a model answers questions; right and readable answers are kept."""

    kind: Literal["sample"]
    data: TaskSection
    """Where questions come from, and the template that the model is asked with."""
    examples: ExamplesSection | None = None
    questions: PositiveInt | None = None
    """How many different ones. Default: all that the task has."""
    samples: PositiveInt = 4
    """Responses to each question."""
    stop: list[str] = []
    """A response ends before the first of these texts: a base model that has seen examples goes on with another one."""
    rewards: dict[str, RewardComponent] = {}
    """What judges responses. Default: the task's own."""
    keep: Literal["correct", "all"] = "correct"
    """`correct` needs a reward that judges this, such as `accuracy` or `model_judge`; a response that such a reward
    gives no verdict on is dropped as "not judged"."""
    min_reward: dict[str, float] = {}
    """Name in `rewards` -> least score; without a score the response is dropped as "not judged"."""
    max_per_question: PositiveInt | None = None
    choose: Literal["random", "shortest", "first"] = "random"
    """Which ones, where `max_per_question` are fewer than pass."""

    _of_the_task = field_validator("rewards", mode="before")(rewards_of_the_data)

    @model_validator(mode="after")
    def _without_tools(self) -> "SampleSource":
        check_tools(None, {"data": self.data})
        return self

    @model_validator(mode="after")
    def _thresholds_known(self) -> "SampleSource":
        for name in self.min_reward:
            if name not in self.rewards:
                raise ValueError(
                    f"min_reward names {name!r}{nearest(name, self.rewards)}; `rewards` has {', '.join(self.rewards)}"
                )
        return self


class RowsSource(SourceSection):
    """[sources.NAME] with `kind = "rows"`: ready data with fields `prompt` and `response` (beside them, if there are
    such columns, `reasoning` and the reference `answer`), or with `messages`.

    With [rewrite] a model adds reasoning to a share of them.
    """

    kind: Literal["rows"]
    data: RecordsSection
    prompt_template: str = "{question}"
    """Template of the stored prompt around the field `prompt`."""


class DecontaminateSection(Section):
    """[decontaminate]: rows that share words with evaluation sets are dropped (`data/overlap.py`)."""

    ngram: PositiveInt = 10
    text: list[Literal["question", "response"]] = Field(default=["question"], min_length=1)
    """What of a row is compared."""
    evaluation: dict[str, EvaluationSetSection] = Field(min_length=1)


class ExcludedSection(Section):
    """[exclude.NAME]: held-out questions of a task, which no source draws."""

    task: TaskComponent
    questions: PositiveInt
    """The first this many, as `rl` and `evaluate` hold them out."""


class CollectConfig(Section):
    """`megatron-r1 collect`: cold-start data (DeepSeek-R1 2.3.1, B.3.2 of v2) and rejection sampling (2.3.3)."""

    output: Path
    """Folder for `chats.jsonl`, `dropped.jsonl` (each with the reason), `summary.json` and the journals from which a
    killed run goes on."""
    tokenizer: Path | None = None
    """Counts the tokens of the table. Default: that of the first of [models]."""
    models: dict[str, SampledModelSection] = {}
    filters: FiltersSection = FiltersSection()
    """Of the sources with `kind = "sample"` that have none of their own."""
    sources: dict[str, Annotated[SampleSource | RowsSource, Field(discriminator="kind")]] = Field(min_length=1)
    exclude: dict[str, ExcludedSection] = {}
    decontaminate: DecontaminateSection | None = None
    reward_models: dict[str, RewardModelServerSection] = {}
    """Reward models that run while responses are judged; a reward of type `reward_model` names the address of one."""
    reward_workers: PositiveInt = 2
    reward_timeout: PositiveFloat = 10.0
    """Seconds one verification may take."""
    seed: int = 0

    @model_validator(mode="after")
    def _models_known(self) -> "CollectConfig":
        for name, source in self.sources.items():
            for where, draw in ((name, source), (f"{name}.rewrite", source.rewrite)):
                if not isinstance(draw, DrawSection):
                    continue
                if draw.model not in self.models:
                    known = f"; it has {', '.join(self.models)}" if self.models else ", which is empty"
                    raise ValueError(
                        f"sources.{where} names model {draw.model!r}{nearest(draw.model, self.models)}, which is not "
                        f"in [models]{known}"
                    )
                draw.sampling(self.models[draw.model])  # `max_tokens` has to fit
        if self.tokenizer is None and not self.models:
            raise ValueError("without [models] `tokenizer`, above all sections, has to say what counts tokens")
        return self

    @model_validator(mode="after")
    def _shares(self) -> "CollectConfig":
        without = [name for name, source in self.sources.items() if source.share is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"either all sources have a `share` or none; {', '.join(without)} have none")
        return self

    def counting(self) -> Path:
        """Folder of the tokenizer that counts."""
        if self.tokenizer is not None:
            return self.tokenizer
        first = next(iter(self.models.values()))
        return first.tokenizer or first.path

    def filters_of(self, source: SourceSection) -> FiltersSection:
        """What the responses of a source must not have."""
        if source.filters is not None:
            return source.filters
        return self.filters if isinstance(source, SampleSource) else FiltersSection()
