"""The sections that several verbs share. Each field's docstring is its documentation."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.component import TaskComponent
from megatron_r1.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class LoraSection(Section):
    """[model.lora]: low-rank adapters beside frozen linear layers (arXiv 2106.09685)."""

    rank: PositiveInt = 16
    """r, the inner dimension of an adapter."""
    alpha: PositiveFloat = 32.0
    """The adapter's product is scaled by alpha / rank."""
    targets: list[Literal["attention", "mlp", "experts"]] = Field(default=["attention", "mlp"], min_length=1)
    """Which linear layers have one: those of attention, those of dense and shared MLPs, those of routed experts."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's input that is dropped in training. In reinforcement learning it blurs the ratio between
    new and old policy, so leave it 0 there."""


class ModelSection(Section):
    """[model]: which model, and the training-only numbers that its Hugging Face config does not carry."""

    path: Path
    """A Hugging Face folder, or, but in reinforcement learning, a Megatron folder that `import` made: `config.json`
    describes the model; weights are read if `load_weights`."""
    load_weights: bool = True
    """False = random initialisation from the config alone."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    mtp_loss_coef: NonNegativeFloat = 0.3
    """lambda of the multi-token-prediction loss (DeepSeek-V3 eq. 25); 0 leaves the MTP layer untrained."""
    balance_loss_coef: NonNegativeFloat = 1e-4
    """alpha of the sequence-wise balance loss (DeepSeek-V3 eq. 17)."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """gamma, the step by which the routing bias moves after each optimizer step (DeepSeek-V3 2.1.2)."""
    init_std: PositiveFloat = 0.006
    """Standard deviation of random initialisation (DeepSeek-V3 4.2; the `initializer_range` of its
    published config.json, 0.02, is a left-over)."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of the weights; None = train all weights."""


class PolicySection(ModelSection):
    """[model] of reinforcement learning: the balance terms of pretraining are off unless asked for."""

    mtp_loss_coef: NonNegativeFloat = 0.0
    """0 leaves the MTP layer out of training; its tensors pass through to the exported model unchanged. Above 0
    it learns to predict the policy's own samples, right or wrong, and the trunk with it."""
    balance_loss_coef: NonNegativeFloat = 0.0
    bias_update_rate: NonNegativeFloat = 0.0


class ParallelSection(Section):
    """[parallel]: how many processes share the work."""

    processes: PositiveInt = 1
    """Data-parallel processes on this node; more than one are started through torchrun unless already under it."""
    threads: NonNegativeInt = 1
    """OpenMP threads of each process on CPU; 0 leaves torch's default. One a process is fastest on shared cores."""


class OptimSection(Section):
    """[optim]: AdamW with warm-up and a schedule."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: PositiveFloat = 1.0
    """Global gradient-norm clip."""

    @model_validator(mode="after")
    def _ordered(self) -> "OptimSection":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self


class CheckpointSection(Section):
    """[checkpoint]: what a killed run goes on from."""

    every: PositiveInt = 10
    """Steps between checkpoints; the last step always writes one."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""


class ReportSection(Section):
    """[report]: where metrics go besides the run directory's own JSONL."""

    title: str = ""
    """What the run is called on the console and in report.html; empty = the verb's name for it."""
    console: bool = True
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "megatron-r1"


class RolloutSection(Section):
    """[rollout]: the vLLM fleet."""

    engines: PositiveInt = 1
    port: PositiveInt = 8700
    """Engine i listens on loopback at port + i."""
    max_model_len: PositiveInt
    """Longest prompt + response, tokens."""
    max_tokens: PositiveInt
    """Longest response, tokens."""
    temperature: PositiveFloat = 1.0
    max_num_seqs: PositiveInt = 256
    """Sequences that one engine decodes at once."""
    kv_cache_gib: PositiveFloat = 0.5
    """KV cache of each engine on CPU, GiB (vLLM's own default there takes most of the memory)."""
    threads: PositiveInt = 2
    """OpenMP threads of each engine on CPU."""
    start_timeout: PositiveFloat = 300.0
    """Seconds an engine may take to answer its first health check."""
    request_timeout: PositiveFloat = 600.0
    """Seconds one batch of responses may take."""
    arguments: list[str] = []
    """More arguments for `vllm serve`, for example `["--tensor-parallel-size=8"]`."""

    @model_validator(mode="after")
    def _fits(self) -> "RolloutSection":
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"max_tokens {self.max_tokens} leaves no room for a prompt in max_model_len {self.max_model_len}"
            )
        return self


class TaskSection(Section):
    """[data] / [heldout]: where questions come from."""

    task: TaskComponent
    """`type` names the task; its other keys are the task's own."""
    template: str | None = None
    """Prompt template by name (`data/templates.py`), or a text with `{question}` in it; None = the task's own."""
    rewards: list[str] | None = None
    """Names in [rewards] that score its questions; None = all (of a mixture: what its members say)."""
