"""Megatron's data-parallel wrapper, AdamW and schedule for one model."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import Adam, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_r1.compat.fused_adam import let_megatron_make_its_state
from megatron_r1.config.sections import OptimSection
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.kernel_rules import refuse
from megatron_r1.model.kernels import sum_in_products
from megatron_r1.model.trainable import Trainable
from megatron_r1.optim.optimizer_rules import OPTIM_RULES
from megatron_r1.optim.schedule import LearningRate, PhaseScheduler, TokensBefore


def make_trainable(
    model: BuiltModel, section: OptimSection, updates: int, tokens_before: TokensBefore | None = None
) -> Trainable:
    """Wrap `model` for training.

    Args:
        model: on its device, weights loaded.
        section: the run's [optim].
        updates: optimizer steps of the whole run; the schedule ends there.
        tokens_before: each of them, where the run counts tokens.

    Raises:
        ConfigError: phases in tokens, and no `tokens_before`; precisions that are not to be had here.
    """
    config = model.config
    if section.precision_aware:
        refuse(OPTIM_RULES, replace(model.setting, optim=section))
        let_megatron_make_its_state(Adam)
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=section.gradients == "float32",
        use_distributed_optimizer=True,
        overlap_grad_reduce=model.kernels.options["overlap_gradient_reduction"],
        fp8_param_gather=config.fp8_param,
        delay_wgrad_compute=config.delay_wgrad_compute,
    )
    ddp = []
    for number, chunk in enumerate(model.chunks):
        _mark_experts(chunk)
        ddp.append(
            DistributedDataParallel(
                config,
                reduction,
                Float16Module(config, chunk) if config.bf16 else chunk,
                disable_bucketing=number > 0,  # only the first chunk's backward pass can overlap with its reduction
            )
        )
        _keep_counts_in_float32(chunk)
    if model.kernels.options["gradient_accumulation_fusion"]:
        sum_in_products(model.chunks)
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
            fp8_recipe=config.fp8_recipe if config.fp8_param else None,
            **_precision(section),
        ),
        ddp,
        use_gloo_process_groups=False,
    )
    return Trainable(ddp, model.chunks, optimizer, _scheduler(optimizer, section, updates, tokens_before))


def _precision(section: OptimSection) -> dict[str, Any]:
    """Megatron's words for what is kept in which precision, and where."""
    if not section.precision_aware:
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": getattr(torch, section.gradients),
        "main_params_dtype": getattr(torch, section.master),
        "exp_avg_dtype": getattr(torch, section.moments),
        "exp_avg_sq_dtype": getattr(torch, section.moments),
        "optimizer_cpu_offload": section.offload > 0,
        "optimizer_offload_fraction": section.offload,
        "overlap_cpu_optimizer_d2h_h2d": section.offload > 0,
    }


def _scheduler(
    optimizer: MegatronOptimizer, section: OptimSection, updates: int, tokens_before: TokensBefore | None
) -> OptimizerParamScheduler:
    if section.phases:
        rate = LearningRate(section.lr, section.warmup_steps, section.phases, tokens_before)
        scheduler: OptimizerParamScheduler = PhaseScheduler(optimizer, rate, section.weight_decay)
    else:
        scheduler = _decay(optimizer, section, updates)
    scheduler.step(1)  # Its step 0 would train the first update with lr 0.
    return scheduler


def _decay(optimizer: MegatronOptimizer, section: OptimSection, updates: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
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
