"""Megatron's data-parallel wrapper, AdamW and schedule for one model."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_r1.config.sections import OptimSection
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.trainable import Trainable


def make_trainable(model: BuiltModel, section: OptimSection, updates: int) -> Trainable:
    """Wrap `model` for training.

    Args:
        model: on its device, weights loaded.
        section: the run's [optim].
        updates: optimizer steps of the whole run; the schedule ends there.
    """
    config = model.module.config
    _mark_experts(model.module)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        Float16Module(config, model.module) if config.bf16 else model.module,
    )
    _keep_counts_in_float32(model.module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=section.min_lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    return Trainable(ddp, model.module, optimizer, _scheduler(optimizer, section, updates))


def _scheduler(optimizer: MegatronOptimizer, section: OptimSection, updates: int) -> OptimizerParamScheduler:
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=max(updates, section.warmup_steps + 1),
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=updates,
        wd_incr_style="constant",
    )
    scheduler.step(1)  # Its step 0 would train the first update with lr 0.
    return scheduler


def _mark_experts(module: GPTModel) -> None:
    """Upstream (0.16.1): at TP > 1 with ETP 1 expert gradients are never reduced unless `allreduce` is False."""
    for name, param in module.named_parameters():
        if ".experts." in name:
            vars(param)["allreduce"] = False


def _keep_counts_in_float32(module: GPTModel) -> None:
    """Upstream (0.16.1): Float16Module turns the router's token counts into bfloat16, and they round."""
    for submodule in module.modules():
        for name in ("local_tokens_per_expert", "expert_bias"):
            counts = getattr(submodule, name, None)
            if isinstance(counts, torch.Tensor):
                setattr(submodule, name, counts.float())
