"""What changes while a run goes on, as functions of the update or of the tokens before it.

Nothing here has a state of its own, so a run that resumes, in whatever layout, goes on exactly.
"""

import math
from collections.abc import Callable

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.schedule import Phase, value_at
from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import ConfigError

TokensBefore = Callable[[int], int]
"""Tokens that a run has consumed before update 0, 1, ..."""


class LearningRate:
    """Linear warm-up times phases that hold a rate or lead to another (DeepSeek-V3, arXiv 2412.19437, 4.2).

    An update belongs to the phase in which it begins. A phase that leads to another rate reaches it with its last
    update; the first already moves.

    Args:
        lr: what the warm-up leads to and the first phase begins with.
        warmup_steps: updates of warm-up; the last one has the whole rate.
        phases: of the run's [optim].
        tokens_before: of this run; None = it does not count them.

    Raises:
        ConfigError: phases in tokens, in a run that does not count them.
    """

    def __init__(self, lr: float, warmup_steps: int, phases: list[Phase], tokens_before: TokensBefore | None) -> None:
        in_tokens = any(phase.until_tokens is not None for phase in phases)
        if in_tokens and tokens_before is None:
            raise ConfigError("only pretraining counts tokens: end the phases of [optim] by `until_step` here")
        self.lr = lr
        self._warmup_steps, self._phases = warmup_steps, phases
        self._position: TokensBefore = tokens_before if in_tokens and tokens_before else lambda update: update

    def at(self, update: int) -> float:
        """The rate of update 0, 1, ..."""
        warm = min(1.0, (update + 1) / self._warmup_steps) if self._warmup_steps else 1.0
        return warm * self._unwarmed(update)

    def _unwarmed(self, update: int) -> float:
        before, after = self._position(update), self._position(update + 1)
        start, rate = 0, self.lr
        for phase in self._phases:
            target = rate if phase.lr is None else phase.lr
            if phase.end is None:
                return target
            if before < phase.end:
                done = min(1.0, (after - start) / (phase.end - start))
                return target + (rate - target) * _left(phase, done)
            start, rate = phase.end, target
        return rate


def _left(phase: Phase, done: float) -> float:
    """The share of the way between two rates that is still to go."""
    return {"constant": 0.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[phase.schedule]


class PhaseScheduler(OptimizerParamScheduler):
    """Megatron's scheduler with another learning rate: the one `LearningRate` gives.

    As upstream's, it counts from 1 for the first update, so the optimizer needs a `step(1)` before that.
    """

    def __init__(self, optimizer: MegatronOptimizer, rate: LearningRate, weight_decay: float) -> None:
        self._rate = rate
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=rate.lr,
            min_lr=0.0,
            lr_warmup_steps=0,
            lr_decay_steps=1,
            lr_decay_style="constant",
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def get_lr(self, param_group: dict[str, object]) -> float:
        """The rate of the update that comes next."""
        return self._rate.at(max(0, self.num_steps - 1))


def apply(config: TransformerConfig, section: ModelSection, tokens: int) -> None:
    """Set what Megatron reads of a model's config at every step: the MTP loss's weight and the bias's speed.

    `mtp_loss_scaling_factor` is read by GPTModel's forward pass, `moe_router_bias_update_rate` by
    `finalize_model_grads`, which takes the config of the first model chunk.

    Args:
        config: of a model chunk; chunks that do not share one need a call each.
        section: the run's [model].
        tokens: that the run has consumed before the step.
    """
    config.mtp_loss_scaling_factor = value_at(section.mtp_loss_coef, tokens)
    config.moe_router_bias_update_rate = value_at(section.bias_update_rate, tokens)
