"""What a run file asks of the machines, whichever verb it is for."""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.dpo import DPOConfig
from megatron_r1.config.load import load
from megatron_r1.config.plan import PlanSection
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.runs import PretrainConfig, RLConfig
from megatron_r1.config.schedule import largest
from megatron_r1.config.section import Section
from megatron_r1.config.sections import ParallelSection
from megatron_r1.config.sft import SFTConfig
from megatron_r1.errors import ConfigError
from megatron_r1.model.memory import Work

Run = PretrainConfig | SFTConfig | RLConfig | RewardModelConfig | DPOConfig
TRAINING: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "rl": RLConfig,
    "reward-model": RewardModelConfig,
    "dpo": DPOConfig,
}
"""Verbs that train a language model."""
_LONGEST_SHARE = 4
"""A sample's mean length, where none is given, is the longest by this."""
PROMPT = 256
"""Tokens of a prompt, at most: R1's questions have 122 to 420 on average."""


@dataclass(frozen=True)
class Load:
    """What all ranks of a trainer are given, whatever the layout."""

    rows: int
    """Of one forward pass."""
    length: int
    """Of a row."""
    tokens: float
    """Of one update, over all ranks."""
    updates: float
    """Of one step: a rollout's minibatches, else 1."""
    steps: float
    """Of the whole run; 0 where the data are not known."""
    attended: float | None
    """Mean length of a sequence, where rows are packed."""
    scorings: float = 0.0
    """Forward passes over all tokens of a step, besides training."""

    def work(self, parallel: ParallelSection, gpus: int) -> Work:
        """A rank's share of it."""
        data = max(1, gpus // (parallel.tensor * parallel.context * parallel.pipeline))
        microbatches = max(1, round(self.tokens / (data * self.rows * self.length)))
        return Work(gpus, self.rows, self.length, microbatches)


def read(path: Path, overrides: Sequence[str]) -> tuple[str, Run]:
    """Verb and config of a run file.

    Raises:
        ConfigError: what `load` raises; not a file of a verb that trains a language model.
    """
    verb = _verb(_tree(path), path)
    config: Any = load(path, overrides, TRAINING[verb])
    return verb, config


def _verb(tree: dict[str, Any], path: Path) -> str:
    """Which verb a run file is for: it does not say so, but each has a key of its own."""
    if "corpus" in tree:
        return "pretrain"
    if "rollout" in tree:
        return "rl"
    if "data" not in tree:
        raise ConfigError(
            f"{path}: only recipes and run files of {', '.join(TRAINING)} can be planned; it has none of their keys "
            "corpus, rollout, data"
        )
    if {"kind", "part"} & tree.keys():
        return "reward-model"
    return "dpo" if {"beta", "label_smoothing", "length_normalised", "heldout_share"} & tree.keys() else "sft"


def _tree(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {"data": None}  # `load` says what is wrong with it


def load_of(run: Run, options: PlanSection) -> Load:
    """What a run trains on."""
    if isinstance(run, PretrainConfig):
        length = run.corpus.sequence_length
        tokens = run.batch * length
        steps = run.steps or (run.tokens or 0) / tokens
        return Load(run.microbatch, length, tokens, 1, steps, None)
    if isinstance(run, RLConfig):
        mean = options.mean_tokens or run.rollout.max_model_len // _LONGEST_SHARE
        samples = run.questions * run.group_size
        row = max(run.tokens_per_microbatch, run.rollout.max_model_len)
        scorings = 2 if reference(run) else 1
        return Load(1, row, samples * mean / run.minibatches, run.minibatches, run.steps, mean, scorings)
    mean = options.mean_tokens or run.max_length // _LONGEST_SHARE
    steps = run.epochs * math.ceil((options.samples or 0) / run.batch)
    texts = 2 if isinstance(run, DPOConfig) or (isinstance(run, RewardModelConfig) and run.kind == "pairwise") else 1
    row = max(run.tokens_per_microbatch, texts * run.max_length)
    # The reference's log-probabilities of all responses are computed once.
    once = 1 / run.epochs if isinstance(run, DPOConfig) else 0.0
    return Load(1, row, run.batch * texts * mean, 1, steps, mean, once)


def processes(parallel: ParallelSection) -> int:
    """Of the trainer, where no option says how many."""
    return math.prod(parallel.machines)


def longest(run: Run) -> int:
    """Tokens of a sequence, at most."""
    if isinstance(run, PretrainConfig):
        return run.corpus.sequence_length
    return run.rollout.max_model_len if isinstance(run, RLConfig) else run.max_length


def reference(run: Run) -> bool:
    """Whether there is a reference policy beside the one that is trained."""
    return isinstance(run, RLConfig) and bool(run.loss.get("kl_coef", 1.0))


def prompt_tokens(run: RLConfig) -> int:
    """Of a question, on average."""
    return min(PROMPT, run.rollout.max_model_len - largest(run.rollout.max_tokens))


def refuse_unplanned(run: Run) -> None:
    """Raises `ConfigError` for what is not counted: low-rank adapters, critics."""
    if run.model.lora:
        raise ConfigError("[model.lora]: plans are of runs that train all weights; this one needs less memory")
    if isinstance(run, RLConfig) and run.critic:
        raise ConfigError(
            "[critic]: plans are of runs that train one model; a critic holds as much again as the policy, so plan "
            'without it (advantage.type = "grpo") and have twice the weights, gradients and optimizer fit'
        )
