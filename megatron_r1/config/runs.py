"""One config class for each verb: what its run file may hold."""

from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.asynchrony import AheadSection, CorrectionSection
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.component import (
    AdvantageComponent,
    LossComponent,
    RewardComponent,
    build,
    default_rewards,
)
from megatron_r1.config.conversation import ConversationSection, check_tools
from megatron_r1.config.corpus import CorpusSection
from megatron_r1.config.curriculum import CurriculumSection
from megatron_r1.config.guard import GuardSection, PretrainGuardSection
from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.config.schedule import BatchRampSection, Tokens
from megatron_r1.config.section import Section
from megatron_r1.config.sections import (
    ModelSection,
    OptimSection,
    ParallelSection,
    PolicySection,
    ReportSection,
    TaskSection,
)
from megatron_r1.errors import nearest


class TokenizerConfig(Section):
    """`megatron-r1 tokenizer train`: sentencepiece with byte fallback."""

    input: list[Path]
    """JSONL files with a `text` key."""
    output: Path
    vocab_size: PositiveInt
    """Special tokens and the 256 byte tokens included."""
    special_tokens: list[str] = []
    """Kept whole, besides the begin, end and padding tokens."""
    split_digits: bool = True
    max_documents: PositiveInt = 1_000_000
    seed: int = 0


class PretrainConfig(Section):
    """`megatron-r1 pretrain`: so many `steps`, or as many as `tokens` need."""

    output: Path
    model: ModelSection
    tokenizer: Path
    corpus: CorpusSection
    optim: OptimSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection(every=500)
    guard: PretrainGuardSection = PretrainGuardSection()
    report: ReportSection = ReportSection()
    steps: PositiveInt | None = None
    tokens: Tokens | None = None
    batch: PositiveInt
    """Sequences of one optimizer step, over all ranks."""
    batch_ramp: BatchRampSection | None = None
    """Smaller batches at first; None = `batch` from the first step on."""
    microbatch: PositiveInt = 1
    """Sequences of one forward pass on one rank."""
    validation_every: PositiveInt = 100
    validation_batches: PositiveInt = 4
    """Of `batch` sequences; as many of the test's."""
    seed: int = 0

    @model_validator(mode="after")
    def _as_long_as_said(self) -> "PretrainConfig":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("the length of the run is `steps` or `tokens`: write one of them")
        if self.batch_ramp:
            self.batch_ramp.sizes(self.batch)  # raises where it does not end there
        return self


class EvaluationSection(Section):
    """[evaluation] of `rl`: held-out questions, answered by the same engine."""

    questions: PositiveInt = 256
    samples: PositiveInt = 4
    """Responses to each question."""
    every: PositiveInt | None = None
    """Steps between evaluations; the first and the last policy are always evaluated."""
    temperature: PositiveFloat | None = None
    """Default: that of [rollout]."""


class ReferenceSection(Section):
    """[reference]: the policy that the KL term is measured against."""

    refresh_every: PositiveInt = 25
    """Steps between `reference := policy`. R1 refreshes every 400 updates, which is 25 rollouts of 16."""


class CriticSection(Section):
    """[critic] of `rl`: the value function that `advantage.type = "gae"` needs."""

    path: Path | None = None
    """A Hugging Face or Megatron folder to begin from: a causal model, which gets a new head, or a reward model.
    Default: the policy's own."""
    optim: OptimSection
    value_clip: NonNegativeFloat = 0.2
    """How far a value may move for one rollout, in units of the reward; 0 = as far as it likes."""
    warmup: NonNegativeInt = 0
    """Steps at the beginning in which the critic alone is trained."""
    epochs: PositiveInt = 1
    """Passes of the critic over each rollout."""


class DynamicSamplingSection(Section):
    """dynamic_sampling of `rl`: groups whose rewards are all equal are replaced by others (DAPO, 3.2)."""

    max_rounds: PositiveInt = 4
    """Rounds of sampling for one rollout, the first included; what is lacking then stays as it is."""


class GeneralSection(TaskSection):
    """[general] of `rl`: other prompts beside those of [data] in the last part of a run.

    R1's second RL stage has general prompts with preference rewards in the last 400 of its 1,700 steps only, because
    longer training on preferences leads to reward hacking (DeepSeek-R1, 2.3.4 and B.4.2).
    """

    from_step: NonNegativeInt = 0
    """The first step with such prompts."""
    share: float = Field(gt=0, le=1)
    """Share of the questions of each rollout from then on."""

    def questions(self, total: int) -> int:
        """How many of a rollout's `total` questions come from here."""
        return round(self.share * total)


class RLConfig(Section):
    """`megatron-r1 rl`: reinforcement learning with GRPO and its like or PPO, R1-Zero being its plainest use.

    One step is one rollout: `questions` x `group_size` responses, cut at random into `minibatches`
    optimizer updates.
    """

    output: Path
    model: PolicySection
    tokenizer: Path | None = None
    """Default: the model folder."""
    steps: PositiveInt
    questions: PositiveInt = 512
    """Questions of one rollout."""
    group_size: PositiveInt = 16
    """G, responses to each question."""
    minibatches: PositiveInt = 16
    """Optimizer updates of one rollout."""
    tokens_per_microbatch: PositiveInt = 16384
    """Packed tokens of one forward pass on one rank; a longer single sample gets a pass of its own."""
    logprob_bound: PositiveFloat = 0.02
    """The run refuses to start when trainer and engine differ by more than this on average, nats per token."""
    data: TaskSection
    heldout: TaskSection
    general: GeneralSection | None = None
    dynamic_sampling: DynamicSamplingSection | None = None
    curriculum: CurriculumSection | None = None
    """Draw questions by their pass rates; None = each when its turn comes."""
    rewards: dict[str, RewardComponent] = {}
    """Name -> reward; each has `type`, an optional `weight` (1.0) and the reward's own keys. Default: what the tasks
    of [data], [heldout] and [general] are usually scored by, each by its own."""
    reward_models: dict[str, RewardModelServerSection] = {}
    """Reward models that the run serves to its own rewards; one of type `reward_model` names the address of one."""
    reward_workers: PositiveInt = 2
    reward_timeout: PositiveFloat = 10.0
    """Seconds one verification may take before its worker is killed and the part scores 0."""
    advantage: AdvantageComponent = {}
    loss: LossComponent = {}
    critic: CriticSection | None = None
    reference: ReferenceSection = ReferenceSection()
    correction: CorrectionSection = CorrectionSection()
    rollout: AheadSection
    conversation: ConversationSection | None = None
    """Tools that the model may call within a response; None = a response is one turn."""
    evaluation: EvaluationSection = EvaluationSection()
    optim: OptimSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    report: ReportSection = ReportSection()
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _scored_by_default(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Without [rewards] each task is scored by its own defaults."""
        sections = {
            name: tree.get(name) for name in ("data", "heldout", "general") if name != "general" or name in tree
        }
        tasks = [
            part["task"] for part in sections.values() if isinstance(part, dict) and isinstance(part.get("task"), dict)
        ]
        if tree.get("rewards") or len(tasks) < len(sections):
            return tree
        named = {
            name: {"rewards": list(default_rewards(part["task"])), **part} for name, part in sections.items() if part
        }
        return {**tree, **named, "rewards": default_rewards(*tasks)}

    @model_validator(mode="before")
    @classmethod
    def _corrected_by_default(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Samples of older weights are weighted by importance unless the run file says how, or not."""
        rollout, correction = tree.get("rollout"), tree.get("correction", {})
        stale = isinstance(rollout, dict) and (rollout.get("max_staleness") or rollout.get("late") == "keep")
        if stale and isinstance(correction, dict):
            return {**tree, "correction": {"kind": "token", **correction}}
        return tree

    @property
    def tasks(self) -> dict[str, TaskSection]:
        """All sections that questions come from, by name."""
        general = {"general": self.general} if self.general else {}
        return {"data": self.data, "heldout": self.heldout, **general}

    @model_validator(mode="after")
    def _consistent(self) -> "RLConfig":
        samples = self.questions * self.group_size
        if samples % self.minibatches:
            raise ValueError(
                f"{self.questions} questions x {self.group_size} samples = {samples} "
                f"do not divide into {self.minibatches} minibatches"
            )
        if self.rollout.serves_fp8 and self.model.dtype != "bfloat16":
            raise ValueError(
                f'rollout.fp8_path: vLLM computes with FP8 weights in bfloat16, but model.dtype = "{self.model.dtype}"'
            )
        return self

    @model_validator(mode="after")
    def _rewarded(self) -> "RLConfig":
        if not self.rewards or self.data.rewards == []:
            raise ValueError("[rewards] is empty, and the task of [data] names no rewards: name at least one")
        for section, part in self.tasks.items():
            carried = build("task", part.task).reward_names()
            for name in [*(part.rewards or []), *sorted(carried)]:
                if name not in self.rewards:
                    raise ValueError(
                        f"`rewards` of [{section}] or of a member names {name!r}{nearest(name, self.rewards)}, which "
                        f"[rewards] does not have; it has {', '.join(self.rewards)}"
                    )
        return self

    @model_validator(mode="after")
    def _tools_are_there(self) -> "RLConfig":
        check_tools(self.conversation, self.tasks)
        if self.conversation and self.rollout.weights_change == "partial_rollouts":
            raise ValueError(
                'weights_change = "partial_rollouts" cuts turns, which [conversation] does not take up again'
            )
        if self.conversation and self.rollout.routing_replay:
            raise ValueError("routing_replay: the experts of a tool's last reply in a [conversation] are not recorded")
        return self

    @model_validator(mode="after")
    def _estimable(self) -> "RLConfig":
        """The estimator has what it needs, and nothing is there for nobody."""
        estimator, kind = build("advantage", self.advantage), self.advantage["type"]
        if self.group_size < 2 and (estimator.needs_group or self.dynamic_sampling):
            who = f"advantage {kind!r}" if estimator.needs_group else "dynamic_sampling"
            raise ValueError(
                f"group_size {self.group_size}: {who} compares the samples of a group, so it needs at least 2"
            )
        if estimator.needs_values and not self.critic:
            raise ValueError(f"advantage {kind!r} needs the values of a critic: write [critic.optim] with its `lr`")
        if self.critic and not estimator.needs_values:
            raise ValueError(f"[critic] is trained for nothing: advantage {kind!r} does not use it, 'gae' does")
        if self.critic and self.critic.warmup >= self.steps:
            raise ValueError(
                f"critic.warmup {self.critic.warmup} leaves none of {self.steps} steps for the policy to be trained in"
            )
        return self

    @model_validator(mode="after")
    def _general_is_asked(self) -> "RLConfig":
        if not self.general:
            return self
        if self.general.from_step >= self.steps:
            raise ValueError(f"general.from_step {self.general.from_step}: the run ends after {self.steps} steps")
        if not self.general.questions(self.questions):
            raise ValueError(f"general.share {self.general.share:g} of {self.questions} questions is none")
        return self
