"""What a job's parts do on every rank: the project's own way from config sections to updates, on invented data.

A part names a model folder and a kind, and may change what is fed how. The first rank writes `seen.json` (figures of
every step, log-probabilities, digests of exported weights) and `end.safetensors`, the weights after the last step.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config import component
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.load import validate
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import OptimSection, ParallelSection, PolicySection
from megatron_r1.errors import ConfigError
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.loss.dpo import Dpo
from megatron_r1.loss.pairwise import Pairwise
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.model.placement import shares
from megatron_r1.train.batch import Minibatch, from_rows, split
from megatron_r1.train.critic import Critic
from megatron_r1.train.dpo import with_reference
from megatron_r1.train.gather import gather
from megatron_r1.train.learner import Learner
from megatron_r1.train.policy import Policy, TrainedModel
from megatron_r1.train.preference_batch import batch as preference_batch
from megatron_r1.train.reference import Reference
from megatron_r1.train.scorer import Scorer
from tests.distributed import data, pushes

STEPS = 5
LONGEST = 128
CAPACITY = 48
"""Tokens of a pack: few, so that there are several."""
OPTIM = {"lr": 1e-2, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1, "clip_grad": 1.0, "eps": 1e-4}
"""eps is that large so that an update is a smooth function of its gradient. With 1e-8 Adam's first steps are the sign
of every entry, and of entries that are all rounding the sign is a matter of luck."""
MODEL = {"dtype": "float32", "mtp_loss_coef": 0.3, "balance_loss_coef": 0.01, "bias_update_rate": 0.01}
TASK = {"type": "reasoning_gym", "dataset": "chain_sum"}

Seen = dict[str, Any]


def run(folder: Path, section: ParallelSection, part: dict[str, Any]) -> None:
    """Do one part; the first rank writes what it saw."""
    seen: Seen = {}
    try:
        initialize(section, seed=0)
        tensors = KINDS[part["kind"]](part, seen)
    except ConfigError as error:
        seen["refused"], tensors = str(error), {}
    if dist.get_rank() == 0:
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "end.safetensors")
        (folder / "seen.json").write_text(json.dumps(seen))


def exported(trained: TrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the engines would be sent; on the first rank, though all take part."""
    return {name: tensor.clone() for name, tensor in trained.model.export(dtype)}


def digests(trained: TrainedModel) -> dict[str, dict[str, str]]:
    """Names in order, and bytes, of all exported weights."""
    return {
        str(dtype): {
            name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in exported(trained, dtype).items()
        }
        for dtype in (torch.float32, torch.bfloat16)
    }


def policy_of(part: dict[str, Any]) -> Policy:
    """The part's model, ready to be trained."""
    section = validate(PolicySection, MODEL | {"path": part["model"]} | part.get("section", {}), where="part")
    optim = validate(OptimSection, OPTIM | part.get("optim", {}), where="part")
    return Policy(build_model(section, LONGEST), optim, STEPS)


def rows(policy: Policy, part: dict[str, Any], step: int) -> Minibatch:
    """This rank's microbatches of a step of pretraining, as `pretrain` deals them.

    Of two rows where there are stages to fill; else of four, or of what the rank has, because each costs the same.
    """
    pipelined = policy.model.config.pipeline_model_parallel_size > 1
    size, found = part.get("microbatch", 2 if pipelined else min(4, data.ROWS // policy.ranks)), []
    whole = data.corpus_rows(step)
    for first in range(policy.rank * size, data.ROWS, size * policy.ranks):
        mine = whole[first : first + size]
        found.append(from_rows(mine[:, :-1], mine[:, 1:], data.ROWS * data.LENGTH))
    return found


def pretrain(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """Next-token prediction on rows."""
    policy = policy_of(part)
    seen["start"] = digests(policy)
    seen["few"] = [name for name, _ in policy.model.export(torch.float32).of_each_stage()]
    seen["figures"] = [policy.step(rows(policy, part, step), CrossEntropy()) for step in range(STEPS)]
    return exported(policy, torch.float32)


def sft(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """Packed conversations, whose responses count."""
    policy, loss = policy_of(part), CrossEntropy()
    seen["figures"] = []
    for step in range(STEPS):
        [minibatch] = split(data.chats(step), 1, step, loss, policy.share(part.get("capacity", CAPACITY)))
        seen["figures"].append(policy.step(minibatch, loss))
    return exported(policy, torch.float32)


def reward_model(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """Preference pairs for a scalar head."""
    section = validate(PolicySection, MODEL | {"path": part["model"], "mtp_loss_coef": 0.0}, where="part")
    scorer = Scorer(build_model(section, LONGEST, "scalar"), validate(OptimSection, OPTIM, where="part"), STEPS)
    loss = Pairwise()
    seen["start"] = digests(scorer)
    batches = [preference_batch(data.pairs(step), loss, scorer.share(CAPACITY)) for step in range(STEPS)]
    seen["values"] = [_gathered([minibatch], [scorer.values(minibatch)]) for minibatch in batches]
    seen["figures"] = [scorer.step(minibatch, loss) for minibatch in batches]
    return exported(scorer, torch.float32)


def dpo(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """Preference pairs for a policy; the reference is what it starts from.

    It is moved by 1 for all chosen texts: with margins of 0 the first step's accuracy would be a matter of rounding.
    """
    policy, loss = policy_of(part | {"section": {"mtp_loss_coef": 0.0}}), Dpo(beta=0.1)
    share = policy.share(CAPACITY)
    steps = [with_reference(policy, data.pairs(step, whole=True), loss, share) for step in range(STEPS)]
    seen["values"] = [[list(item.reference or ()) for item in items] for items in steps]
    moved = [[replace(item, reference=_moved(item.reference or ())) for item in items] for items in steps]
    seen["figures"] = [policy.step(preference_batch(items, loss, share), loss) for items in moved]
    return exported(policy, torch.float32)


def rl(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """A rollout cut into as many updates as there are steps; another one is scored after them.

    Log-probabilities are those that the loss is fed, of the policy and of the reference.
    """
    learner = _learner(part)
    seen["figures"], seen["logprobs"], seen["entropies"] = [], [], []
    for step in (0, 1):
        rollout = data.groups(step)
        if learner.config.rollout.routing_replay:
            shape = learner.policy.model.config
            data.recorded(rollout, shape.num_layers, shape.num_moe_experts, shape.moe_router_topk)
        batch, figures = learner.score(rollout, step)
        for name in ("old_logprobs", "ref_logprobs"):
            scored = [[getattr(micro.inputs, name) for micro in minibatch] for minibatch in batch]
            seen["logprobs"].append(_gathered(batch, scored))
        if step == 1:
            _, entropies = zip(*map(learner.policy.logprobs_and_entropies, batch), strict=True)
            seen["entropies"].append(_gathered(batch, entropies))
        batch, estimated = learner.estimate(rollout, batch, step)
        seen["figures"].append(figures | estimated)
        if step == 0:
            seen["figures"] += [learner.critic.step(batch)] if learner.critic else []
            seen["figures"] += [learner.policy.step(minibatch, learner.loss) for minibatch in batch]
    critic = exported(learner.critic.scorer, torch.float32) if learner.critic else {}
    return exported(learner.policy, torch.float32) | {f"critic.{name}": tensor for name, tensor in critic.items()}


def resume(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """Some steps of pretraining from a checkpoint, or from the start, to another; and the former, saved again."""
    policy, first, end = policy_of(part), part["first"], part["end"]
    if first:
        _checkpoints(part["from"]).load(first, policy.trainable, {})
        seen["start"] = digests(policy)
        _checkpoints(part["again"]).save(first, policy.trainable, {}, {})
    seen["figures"] = [policy.step(rows(policy, part, step), CrossEntropy()) for step in range(first, end)]
    seen["end"] = digests(policy)
    _checkpoints(part["to"]).save(end, policy.trainable, {}, {})
    return exported(policy, torch.float32)


def build(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """The model alone, with random weights unless the part says otherwise."""
    policy = policy_of(part)
    seen["start"] = digests(policy)
    return {}


def adapted(part: dict[str, Any], seen: Seen) -> dict[str, torch.Tensor]:
    """Low-rank adapters whose values follow from their names in the whole model."""
    policy = policy_of(part | {"section": {"lora": {"rank": 2}, "mtp_loss_coef": 0.0}})
    for share in shares(policy.model.chunks):
        if ".lora." in share.name:
            generator = torch.Generator().manual_seed(zlib.crc32(share.name.encode()))
            share.tensor.copy_(torch.randn(share.tensor.shape, generator=generator))
    seen["start"] = digests(policy)
    return {}


KINDS = {
    "pretrain": pretrain,
    "sft": sft,
    "rl": rl,
    "reward_model": reward_model,
    "dpo": dpo,
    "resume": resume,
    "build": build,
    "adapted": adapted,
    "pushed": lambda part, seen: pushes.pushed(policy_of(part).model, part, seen),
    "broken_push": lambda part, seen: pushes.broken(policy_of(part).model, part, seen),
}


def _moved(reference: Sequence[float]) -> tuple[float, ...]:
    chosen, rejected = reference
    return chosen + 1, rejected


def _checkpoints(folder: str) -> Checkpoints:
    return Checkpoints(Path(folder), CheckpointSection(keep=9), {"seed": 0})


def _gathered(batch: Sequence[Minibatch], values: Sequence[Sequence[torch.Tensor]]) -> list[list[float]]:
    """By sample; on a rank that holds a part of the model alone the samples are there once all the same."""
    found = gather(batch, values, range(10_000))
    return [found[number] for number in sorted(found)]


def _learner(part: dict[str, Any]) -> Learner:
    """As `Learner.build`, without an engine and without a tokenizer."""
    tree: dict[str, Any] = {
        "output": str(Path(part["model"]).parent),
        "steps": 1,
        "questions": data.QUESTIONS,
        "group_size": data.SAMPLES,
        "minibatches": STEPS,
        "tokens_per_microbatch": part.get("capacity", CAPACITY),
        "model": MODEL | {"path": part["model"]} | part.get("section", {}),
        "data": {"task": TASK},
        "heldout": {"task": TASK},
        "rewards": {"accuracy": {"type": "task"}},
        "advantage": {"type": "group_relative"},
        "loss": {"type": "grpo", "clip_eps": 0.2, "kl_coef": 0.1},
        "rollout": {"max_model_len": LONGEST, "max_tokens": 32, "temperature": 0.9},
        "optim": OPTIM | part.get("optim", {}),
    }
    if part.get("critic"):
        tree["critic"] = {"path": str(Path(part["model"]).with_name("reward")), "optim": OPTIM, "epochs": 2}
    config = validate(RLConfig, tree | part.get("run", {}), where="part")
    policy = Policy(build_model(config.model, LONGEST), config.optim, STEPS, config.rollout.temperature)
    return Learner(
        config=config,
        tokenizer=cast(Any, None),
        policy=policy,
        reference=Reference(policy, 100),
        critic=Critic(config, config.critic) if config.critic else None,
        rollouts=cast(Any, None),
        heldout=[],
        advantage=component.build("advantage", config.advantage),
        loss=component.build("loss", config.loss),
    )
