"""Run files of the verbs that sample from a finished model: `evaluate` and `data filter`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_r1.config.component import RewardComponent, TaskComponent, default_rewards
from megatron_r1.config.conversation import ConversationSection, check_tools
from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.config.section import Section
from megatron_r1.config.sections import RolloutSection, TaskSection


class ServedModelSection(Section):
    """[model]: which model the engines load."""

    path: Path
    """A Hugging Face folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


def rewards_of_the_data(rewards: Any, info: ValidationInfo) -> Any:
    """Validator of a key `rewards` behind a [data]: those of its task, where none are named."""
    data = info.data.get("data")  # missing where that itself is wrong
    return default_rewards(data.task) if not rewards and data else rewards


class NucleusSection(RolloutSection):
    """[rollout] of a model that is only sampled from."""

    max_tokens: PositiveInt
    """Longest response, tokens."""
    temperature: NonNegativeFloat = 1.0
    """0 = always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest ones that together have this probability."""


class BenchmarkRolloutSection(NucleusSection):
    """[rollout] of `evaluate`, with the sampling that DeepSeek-R1 is evaluated with."""

    temperature: NonNegativeFloat = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class SamplingSection(Section):
    """What it takes to have a model answer questions and the answers judged."""

    model: ServedModelSection
    tokenizer: Path | None = None
    """Default: the model folder."""
    rollout: NucleusSection
    conversation: ConversationSection | None = None
    """Tools that the model may call within a response; None = a response is one turn."""
    samples: PositiveInt = 8
    """Responses to each question."""
    batch: PositiveInt = 128
    """Questions that are sampled together; a run that is killed loses the batch that it was at."""
    reward_models: dict[str, RewardModelServerSection] = {}
    """Reward models that run while answers are judged; a reward of type `reward_model` names the address of one."""
    reward_workers: PositiveInt = 2
    reward_timeout: PositiveFloat = 10.0
    """Seconds one verification may take."""
    seed: int = 0


class BenchmarkSection(Section):
    """[tasks.<name>] of `evaluate`: a task, and how much of it."""

    task: TaskComponent
    template: str | None = None
    """As in [data] of a run; None = the task's own."""
    questions: PositiveInt | None = None
    """How many; the same ones in every run. Default: all that the task has."""
    rewards: dict[str, RewardComponent] = {}
    """Default: the task's own, and language consistency. At least one has to judge whether an answer is right."""
    samples: PositiveInt | None = None
    """Default: `samples` of the run."""
    tools: list[str] | None = None
    """Names in [conversation.tools] that answers to its questions may call; None = all."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _of_the_task(cls, rewards: Any, info: ValidationInfo) -> Any:
        task = info.data.get("task")  # missing where that itself is wrong
        beside = {"language_consistency": {"type": "language_consistency"}}
        return default_rewards(task) | beside if not rewards and task else rewards

    def asked(self) -> TaskSection:
        """Where its questions come from."""
        return TaskSection(task=self.task, template=self.template, tools=self.tools)


class EvaluateConfig(SamplingSection):
    """`megatron-r1 evaluate`: a model on tasks."""

    output: Path
    """Folder for `results.json`, `samples.jsonl` and `scored.jsonl`, from which a killed run goes on."""
    rollout: BenchmarkRolloutSection
    samples: PositiveInt = 16
    pass_at: list[PositiveInt] = [1]
    """Each k of the pass@k to report, besides pass@1; not above the samples of any task."""
    compare_with: Path | None = None
    """Output folder of an earlier evaluation: the gain over it, question by question, where tasks have one name."""
    tasks: dict[str, BenchmarkSection] = Field(min_length=1)
    """Name -> task."""

    @model_validator(mode="after")
    def _enough_samples(self) -> "EvaluateConfig":
        for name, task in self.tasks.items():
            if max(self.pass_at, default=1) > (task.samples or self.samples):
                raise ValueError(
                    f"pass_at holds {max(self.pass_at)}, but task {name!r} has {task.samples or self.samples} samples: "
                    "pass@k needs at least k"
                )
        return self

    @model_validator(mode="after")
    def _tools_are_there(self) -> "EvaluateConfig":
        check_tools(self.conversation, {f"tasks.{name}": task for name, task in self.tasks.items()})
        return self


class LengthSection(Section):
    """[length] of `data filter`: bounds, both included; None = no bound."""

    min_characters: NonNegativeInt | None = None
    """Of the question's text, without its template."""
    max_characters: PositiveInt | None = None
    min_tokens: NonNegativeInt | None = None
    """Of the whole prompt, template included."""
    max_tokens: PositiveInt | None = None


class PassRateSection(SamplingSection):
    """[pass_rate] of `data filter`: how often a model solves a question."""

    min: float = 0.0
    """A question is kept when min < pass rate < max. The defaults keep what is solved sometimes: a group of answers
    that are all wrong or all right gives GRPO no signal. (open-r1: 0.1 and 0.9.) -1 keeps what is never solved, too."""
    max: float = 1.0
    """2 keeps what is always solved, too."""

    @model_validator(mode="after")
    def _ordered(self) -> "PassRateSection":
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}, so nothing would be kept")
        return self


class FilterConfig(Section):
    """`megatron-r1 data filter`: the rows of a task's data set that are worth training on.

    Deduplication, then length, then pass rate: each sees what those before it have kept.
    """

    output: Path
    """Folder for `kept.jsonl`, `dropped.jsonl` (each row with the reason), `summary.json` and `scored.jsonl`, from
    which a killed run goes on."""
    data: TaskSection
    """A task over a data set; `kept.jsonl` has the columns of that, so the same task reads it."""
    drop_unreadable: bool = False
    """Drop rows that the task cannot make a question of; otherwise the first one stops the run."""
    deduplicate: bool = True
    """Of questions with the same text, but for case and white space, only the first is kept."""
    length: LengthSection | None = None
    tokenizer: Path | None = None
    """Default: that of [pass_rate]. Counts the tokens of [length]."""
    pass_rate: PassRateSection | None = None
    """Without it no model is started."""
    rewards: dict[str, RewardComponent] = {}
    """What [pass_rate] judges answers by; default: the task's own. At least one has to judge whether one is right."""

    _of_the_task = field_validator("rewards", mode="before")(rewards_of_the_data)

    @model_validator(mode="after")
    def _tools_are_there(self) -> "FilterConfig":
        check_tools(self.pass_rate.conversation if self.pass_rate else None, {"data": self.data})
        return self

    @model_validator(mode="after")
    def _tokenizer_known(self) -> "FilterConfig":
        bounds = self.length and (self.length.min_tokens, self.length.max_tokens)
        if bounds and bounds != (None, None) and not self.tokenizer and not self.pass_rate:
            raise ValueError(
                "[length] counts tokens: set `tokenizer`, above all sections, to the folder of what counts them"
            )
        return self
