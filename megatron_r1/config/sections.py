"""The sections that several verbs share. Each field's docstring is its documentation."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.component import TaskComponent
from megatron_r1.config.context_extension import ContextSection
from megatron_r1.config.engine_arguments import ranks, refuse_ours
from megatron_r1.config.kernels import Fp8Section, KernelsSection
from megatron_r1.config.recompute import MemorySection
from megatron_r1.config.schedule import Phases, Piecewise, Stepwise, largest
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
    mtp_loss_coef: Piecewise = 0.3
    """lambda of the multi-token-prediction loss (DeepSeek-V3 eq. 25); 0 leaves the MTP layer untrained. A list changes
    it: `[{ value = 0.3, until_tokens = 10e12 }, { value = 0.1 }]`."""
    balance_loss_coef: NonNegativeFloat = 1e-4
    """alpha of the sequence-wise balance loss (DeepSeek-V3 eq. 17)."""
    bias_update_rate: Piecewise = 1e-3
    """gamma, the step by which the routing bias moves after each optimizer step (DeepSeek-V3 2.1.2); a list as of
    `mtp_loss_coef` changes it."""
    init_std: PositiveFloat = 0.006
    """Standard deviation of random initialisation (DeepSeek-V3 4.2; the `initializer_range` of its
    published config.json, 0.02, is a left-over)."""
    context: ContextSection | None = None
    """Go on with a longer context; None = the one of `config.json`."""
    memory: MemorySection = MemorySection()
    kernels: KernelsSection = KernelsSection()
    fp8: Fp8Section | None = None
    """Products of linear layers in 8 bits; None = in `dtype`."""
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
    """[parallel]: how many processes share the work, and how.

    All processes = tensor x context x pipeline x data; experts are dealt over expert x expert_tensor of those that hold
    the same layers. What is trained is the same whatever the layout, up to the order of sums (docs/parallel.md).
    """

    nodes: PositiveInt | None = None
    """How many, with `processes` each; more than one are started by Slurm (docs/slurm.md). Default: the fewest that the
    sizes below need."""
    processes: PositiveInt | None = None
    """Of each node; more than one are started through torchrun unless already under it. Default: the fewest that the
    sizes below need."""
    tensor: PositiveInt = 1
    """Tensor-parallel ranks, which share each layer (arXiv 1909.08053); above 1 always with sequence parallelism
    (arXiv 2205.05198)."""
    pipeline: PositiveInt = 1
    """Pipeline stages, which share the layers, one forward, one backward (arXiv 2104.04473)."""
    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline rank (interleaved schedule)."""
    pipeline_layout: str | None = None
    """Which layers stand on which stage, in Megatron's words: `"Et*2|t*3|mL"`, E = embedding, t = transformer layer,
    m = MTP layer, L = loss. Default: as many layers on each."""
    expert: PositiveInt = 1
    """Expert-parallel ranks, which share the routed experts (arXiv 2006.16668)."""
    expert_tensor: PositiveInt = 1
    """Ranks that share each routed expert's matrices."""
    context: PositiveInt = 1
    """Context-parallel ranks, which share each sequence's tokens."""
    threads: NonNegativeInt = 1
    """OpenMP threads of each process on CPU; 0 leaves torch's default. One a process is fastest on shared cores."""

    @property
    def fewest(self) -> int:
        """The fewest processes that hold the model."""
        return math.lcm(self.tensor * self.context, self.expert * self.expert_tensor) * self.pipeline

    @property
    def machines(self) -> tuple[int, int]:
        """Nodes, and processes on each."""
        if self.processes is None:
            return self.nodes or 1, -(-self.fewest // (self.nodes or 1))
        return self.nodes or -(-self.fewest // self.processes), self.processes

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelSection":
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline = {self.virtual_pipeline} cuts pipeline stages, but pipeline = 1")
        return self


class OptimSection(Section):
    """[optim]: AdamW with warm-up and a schedule."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    phases: Phases = []
    """What the rate does beside the warm-up, instead of `schedule` and `min_lr`."""
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: PositiveFloat = 1.0
    """Global gradient-norm clip."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Adam's two; DeepSeek-V3 (3.3.3) keeps them in bfloat16."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """What weight gradients are summed in, over microbatches and ranks."""
    master: Literal["float32", "float16"] = "float32"
    """The optimizer's own copy of bfloat16 weights."""
    offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the optimizer's state that lies in the host's memory and is updated there."""

    @property
    def precision_aware(self) -> bool:
        """Whether some of it needs Megatron's precision-aware optimizer, which is Transformer Engine's."""
        return {self.moments, self.gradients, self.master} != {"float32"} or self.offload > 0

    @model_validator(mode="before")
    @classmethod
    def _phases_instead(cls, tree: Any) -> Any:
        """With phases a verb's default schedule is not meant."""
        given = isinstance(tree, dict) and tree.get("phases")
        return {"schedule": "constant", "min_lr": 0.0, **tree} if given else tree

    @model_validator(mode="after")
    def _ordered(self) -> "OptimSection":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        if self.phases and (self.schedule != "constant" or self.min_lr):
            raise ValueError("[[optim.phases]] say what `schedule` and `min_lr` would: leave these out")
        return self


class ReportSection(Section):
    """[report]: where metrics go besides the run directory's own JSONL."""

    title: str = ""
    """What the run is called on the console and in report.html; empty = the verb's name for it."""
    console: bool = True
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "megatron-r1"
    prometheus_port: PositiveInt | None = None
    """Where the newest metrics are served at `/metrics`; None = nowhere."""
    prometheus_address: str = "127.0.0.1"
    """Of this machine, for that port. There is no password: keep it inside the cluster."""


class RolloutSection(Section):
    """[rollout]: the vLLM fleet."""

    engines: PositiveInt = 1
    """How many the run starts, if no `addresses` are given."""
    port: PositiveInt = 8700
    """Engine i listens on loopback at port + i."""
    addresses: list[Annotated[str, Field(pattern=r"^https?://[^/]+$")]] = []
    """Engines that run elsewhere, such as `["http://node7:8700"]`; the run then starts none (`docs/fleet.md`)."""
    token_env: str = "MEGATRON_R1_ENGINE_TOKEN"
    """Environment variable with the token that engines at `addresses` ask for."""
    dispatch: Literal["batch", "continuous"] = "batch"
    """How prompts reach engines. `batch`: each engine gets one contiguous share of a batch, all at once; the same seed
    gives the same bits. `continuous`: an engine gets the next group when it has a sequence free, and the groups of one
    that is lost go to others; which requests share a step, and so the last bits of log-probabilities, vary from run to
    run. Choose it for several engines and long answers of uneven length."""
    max_model_len: PositiveInt
    """Longest prompt + response, tokens."""
    max_tokens: Stepwise
    """Longest response, tokens. In `rl` a list changes it: `[{ value = 32768, until_step = 512 }, { value = 65536 }]`,
    where a response may be as long as the step of the (oldest) weights that may begin it says."""
    temperature: PositiveFloat = 1.0
    max_num_seqs: PositiveInt = 256
    """Sequences that one engine decodes at once; with `--data-parallel-size`, each of its replicas."""
    kv_cache_gib: PositiveFloat = 0.5
    """KV cache of each engine on CPU, GiB (vLLM's own default there takes most of the memory)."""
    threads: PositiveInt = 2
    """OpenMP threads of each engine on CPU."""
    start_timeout: PositiveFloat = 300.0
    """Seconds an engine may take to answer its first health check."""
    request_timeout: PositiveFloat = 600.0
    """Seconds one batch of responses (`continuous`: one group) may take."""
    stall_timeout: PositiveFloat = 120.0
    """Seconds without a sign of life after which an engine that should be answering counts as lost; engines give one
    every few seconds, and none is expected while they load weights."""
    max_restarts: NonNegativeInt = 3
    """How often in a row an engine is restarted (one at an address: waited for) before it is given up. The run ends
    when all are given up; with `dispatch = "batch"`, when one is."""
    first_gpu: NonNegativeInt | None = None
    """GPU of this machine that engine 0 begins at; each takes as many as its `arguments` say, one engine after
    another. None = every engine sees all of them, as those that share their GPUs with the trainer do."""
    sleep: bool = False
    """Engines that share GPUs with the trainer give their memory back (vLLM's sleep: weights go to the host, the cache
    is dropped) from the last sample of a step until they get new weights."""
    transport: Literal["auto", "nccl", "ipc", "shared_memory", "disk"] = "auto"
    """How weights reach the engines: from GPU to GPU in one NCCL group; by CUDA IPC, within the first rank's GPU;
    through files in shared memory, for engines of this machine; through files in `<output>/sync`, which every rank
    writes its share of, for a file system that all nodes and engines see. What auto chooses: docs/fleet.md."""
    transfer_timeout: PositiveFloat = 600.0
    """Seconds one transfer of weights may take."""
    transfer_retries: NonNegativeInt = 1
    """How often a transfer that has failed is repeated, from the first tensor, before the run ends."""
    transfer_buffer_gib: PositiveFloat = 1.0
    """GiB of tensors that `nccl` and `ipc` pack together. Of the first rank's GPU `nccl` takes three such buffers (as
    tensors come, in one piece, on the way), of each of an engine two; `ipc` takes one of the GPU that both share. One
    that is smaller than a tensor grows to its size."""
    arguments: list[str] = []
    """More arguments for `vllm serve`, for example `["--tensor-parallel-size=8"]`."""

    @property
    def returns_experts(self) -> bool:
        """Whether engines say which experts each token went to."""
        return False

    @property
    def serves_fp8(self) -> bool:
        """Whether engines are sent DeepSeek's FP8."""
        return False

    def served(self, model: Path) -> Path:
        """The folder that engines start on, where the run trains `model`."""
        return model

    @property
    def on_this_machine(self) -> bool:
        """Whether all engines are."""
        hosts = {urlsplit(address).hostname for address in self.addresses}
        return hosts <= {"127.0.0.1", "::1", "localhost"}

    @property
    def on_first_rank_gpu(self) -> bool:
        """Whether every engine is one GPU, the one that the trainer's first rank has, too."""
        alone = not self.addresses and math.prod(ranks(self.arguments)) == 1
        return alone and (self.first_gpu is None or (self.first_gpu == 0 and self.engines == 1))

    @property
    def beside_trainer(self) -> bool:
        """Whether no engine has a GPU that the trainer has, as far as a run file tells."""
        return bool(self.addresses or self.first_gpu)

    @property
    def shares_gpus(self) -> bool:
        """Whether engines have GPUs that the trainer has, too, as a run file says by what works only so."""
        return self.sleep or self.transport == "ipc"

    @property
    def chosen_transport(self) -> Literal["nccl", "ipc", "shared_memory", "disk"]:
        """`transport`, or what auto chooses: nothing that has never run on a GPU."""
        if self.transport != "auto":
            return self.transport
        return "shared_memory" if self.on_this_machine else "disk"

    @model_validator(mode="after")
    def _fits(self) -> "RolloutSection":
        if (longest := largest(self.max_tokens)) >= self.max_model_len:
            raise ValueError(f"max_tokens {longest} leaves no room for a prompt in max_model_len {self.max_model_len}")
        refuse_ours(self.arguments)
        if twice := [one for one in self.addresses if self.addresses.count(one) > 1]:
            raise ValueError(f"addresses names {twice[0]} twice: each engine once")
        if self.transport == "shared_memory" and not self.on_this_machine:
            raise ValueError('transport = "shared_memory" does not reach addresses on other machines: "disk" does')
        if self.sleep and self.addresses:
            raise ValueError(
                "sleep gives a GPU's memory back to the trainer, which has no GPU of engines on other nodes, at "
                "addresses: leave it out"
            )
        if self.first_gpu is not None and self.addresses:
            raise ValueError("first_gpu is for engines that the run starts on its own node, not for those at addresses")
        if self.transport == "ipc" and not self.on_first_rank_gpu:
            raise ValueError(
                'transport = "ipc" reaches engines of one GPU that the trainer\'s first rank has, too, without '
                'addresses, first_gpu or parallel sizes: choose "nccl" or, on other nodes, "disk"'
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
    tools: list[str] | None = None
    """Names in [conversation.tools] that answers to its questions may call; None = all."""
