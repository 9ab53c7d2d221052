"""Rollout routing replay (R3, arXiv 2510.11370): what it needs, and how far apart engine and learner are without it."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.parallel import device
from megatron_r1.train.batch import Minibatch, with_inputs
from megatron_r1.train.policy import Figures, Policy
from megatron_r1.types import Group


def refuse_unfit(model: BuiltModel) -> None:
    """Before engines start.

    Raises:
        ConfigError: the model has no routers, or some that cannot be told what to choose.
    """
    if not model.config.num_moe_experts:
        raise ConfigError(f"rollout.routing_replay: {model.setting.section.path} has no experts; leave it out")
    if model.kernels.options["router_fusion"]:
        raise ConfigError(
            "rollout.routing_replay with model.kernels.router_fusion: the fused kernel chooses experts itself; write "
            "router_fusion = false"
        )


def refuse_unrecorded(groups: Sequence[Group], model: BuiltModel) -> None:
    """Before a rollout is trained on: have the engines recorded this model's experts?

    Raises:
        EngineError: not of all samples, or other numbers than the model's.
    """
    config = model.config
    layers, chosen, experts = config.num_layers, config.moe_router_topk, config.num_moe_experts
    for group in groups:
        for sample in group.samples:
            wanted = (len(group.prompt_tokens) + len(sample.tokens) - 1, layers, chosen)
            found = None if sample.routed_experts is None else sample.routed_experts.shape
            if found != wanted:
                raise EngineError(
                    "rollout.routing_replay: engines record the experts of each token as [tokens, layers, experts a "
                    f"token], {list(wanted)} of a response to question {group.question.id}, but it came with "
                    f"{list(found) if found else 'none'}; a checkpoint of a run without routing_replay may hold such "
                    "responses"
                )
    first = groups[0].samples[0].routed_experts
    if first is not None and first.max() >= experts:
        raise EngineError(f"rollout.routing_replay: an engine recorded expert {first.max()} of {experts}")


def without_replay(policy: Policy, minibatch: Minibatch, compare: Callable[[list[Minibatch]], Figures]) -> Figures:
    """What a minibatch would be like if the learner's routers chose.

    Args:
        policy: before it is updated.
        minibatch: this rank's part, with `old_logprobs`.
        compare: trainer and engine, as `logprob_difference`.

    Returns:
        `own_routing_difference_mean` and `_max`, nats; `rerouted_choices`, the share of choices (of one token in one
        layer) that are not the engine's; `rerouted_tokens`, the share of tokens with such a choice in some layer.
    """
    logprobs, elsewhere = policy.rerouted(minibatch)
    found = compare([with_inputs(minibatch, old_logprobs=logprobs)])
    renamed = {name.replace("logprob", "own_routing"): value for name, value in found.items()}
    tokens = torch.cat([torch.zeros(0, dtype=torch.int32, device=device()), *(one.any(0).int() for one in elsewhere)])
    policy.passes.any_stage(tokens)
    choices = (sum(int(one.sum()) for one in elsewhere), sum(one.numel() for one in elsewhere))
    counts = torch.tensor([*choices, int(tokens.sum()), tokens.numel()], dtype=torch.float64, device=device())
    dist.all_reduce(counts)
    changed, made, moved, seen = counts.tolist()
    return {name: value for name, value in renamed.items() if math.isfinite(value)} | {
        "rerouted_choices": changed / made,
        "rerouted_tokens": moved / seen,
    }
