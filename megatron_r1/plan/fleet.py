"""Engines: those of `rl`, of reward models beside it, and those of verbs that only sample; what they hold, how fast."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_r1.config.plan import PlanSection
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.schedule import shares
from megatron_r1.config.sections import RolloutSection
from megatron_r1.model import fp8
from megatron_r1.model.memory import Shape
from megatron_r1.plan.engine_arguments import engine_of
from megatron_r1.plan.hardware import Hardware
from megatron_r1.plan.layouts import Finding
from megatron_r1.plan.movement import Transfer, through_memory, through_storage, weight_sync, within_gpu
from megatron_r1.plan.rollout import Decoding, Engine, Lengths, cache_tokens, engine_weights
from megatron_r1.plan.run_file import prompt_tokens
from megatron_r1.plan.tensors import Counts
from megatron_r1.wording import counted

GIB = 2**30
BFLOAT16 = 2.0
FP8 = 1.0 + 4 / math.prod(fp8.BLOCK)
"""Bytes of a weight on its way, in FP8 with a scale of float32 for each block."""
_SIMULATED = 16384
"""Samples of an engine whose decoding is followed step by step; of more, what comes before the end is repeated."""


@dataclass(frozen=True)
class FleetPlan:
    """All engines together."""

    engines: int
    gpus: int
    weights: float
    """Bytes on each GPU."""
    cache_tokens: int
    """Of one engine."""
    at_once: int
    """Samples of mean length that one engine decodes at once."""
    rollout_seconds: float
    """Until all samples are there, mean over steps; 0 where their number is not known."""
    tail_seconds: float
    """Of the rollout, after the last sample has begun."""
    tokens_per_second: float
    sync: Transfer
    """New weights; of verbs that only sample, reading them once."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What a step waits for it."""
        return self.rollout_seconds + self.sync.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "sync": vars(self.sync), "findings": [vars(finding) for finding in self.findings]}


@dataclass(frozen=True)
class Asked:
    """What a fleet is asked for."""

    samples: int
    prompt: int
    """Tokens of a question."""
    mean: int
    """Of a sample with its question."""
    spread: float
    steps: int = 1
    """How often, where lengths change meanwhile."""


def plan_fleet(
    shape: Shape, run: RLConfig, options: PlanSection, counts: Counts, trainer: int, hardware: Hardware
) -> FleetPlan:
    """That of a run.

    Args:
        shape: the policy's.
        run: its run file.
        options: lengths.
        counts: of the policy.
        trainer: its GPUs.
        hardware: where.
    """
    section = run.rollout
    mean = options.mean_tokens or section.max_model_len // 4
    asked = Asked(run.questions * run.group_size, prompt_tokens(run), mean, options.spread, run.steps)
    made = fleet(shape, section, asked, counts, hardware)
    size = sent_bytes(shape, section.serves_fp8, counts)
    return replace(made, sync=_sync(section, trainer, made.gpus // made.engines, size, hardware))


def sent_bytes(shape: Shape, in_fp8: bool, counts: Counts) -> float:
    """Of new weights: in FP8 all but embedding and head, norms and routers being too few to count."""
    if not in_fp8:
        return BFLOAT16 * counts.main
    ends = shape.vocab_size * shape.config.hidden_size * (1 if shape.tied else 2)
    return BFLOAT16 * ends + FP8 * (counts.main - ends)


def _sync(section: RolloutSection, trainer: int, gpus: int, size: float, hardware: Hardware) -> Transfer:
    """By the run's transport from the trainer's GPUs to each engine's; engines of several nodes will be at addresses.

    `size`: bytes.
    """
    transport, here = section.chosen_transport, section.on_this_machine and gpus <= hardware.gpus_per_node
    if transport == "nccl":
        return weight_sync(size, hardware)
    if transport == "ipc":
        return within_gpu(size, hardware)
    if transport == "shared_memory" and here:
        return through_memory(size, hardware)
    return through_storage(size, trainer, gpus, hardware)


def fleet(shape: Shape, section: RolloutSection, asked: Asked, counts: Counts, hardware: Hardware) -> FleetPlan:
    """That of a [rollout]."""
    engine = engine_of(section.arguments, section.max_num_seqs, section.serves_fp8)
    count = len(section.addresses) or section.engines
    room = cache_tokens(shape, engine, counts, hardware)
    fits = room // engine.copies >= section.max_model_len
    each = math.ceil(asked.samples / count)
    seconds = tail = generated = 0.0
    if fits and each:
        for longest, share in shares(section.max_tokens, asked.steps).items():
            lengths = Lengths(max(1.0, asked.mean - asked.prompt), asked.spread, longest).sample(min(each, _SIMULATED))
            whole, end = Decoding(shape, engine, hardware).rollout(lengths, asked.prompt, room)
            seconds += share * (end + (whole - end) * each / len(lengths))
            tail += share * end
            generated += share * each * sum(lengths) / len(lengths)
    return FleetPlan(
        engines=count,
        gpus=count * engine.gpus,
        weights=engine_weights(shape, engine, counts),
        cache_tokens=max(0, room),
        at_once=max(0, min(engine.sequences * engine.copies, room // asked.mean)),
        rollout_seconds=seconds,
        tail_seconds=tail,
        tokens_per_second=generated * count / seconds if seconds else 0.0,
        sync=weight_sync(counts.main * engine.weight, hardware),
        findings=[] if fits else [_full(shape, engine, counts, section.max_model_len, hardware)],
    )


def on_trainers_gpus(section: RolloutSection, hardware: Hardware) -> tuple[int, float]:
    """GPUs that the trainer shares with engines, and bytes that these take of each while they are awake.

    Args:
        section: the run's [rollout].
        hardware: where.
    """
    if not section.shares_gpus:
        return 0, 0.0
    engine = engine_of(section.arguments, section.max_num_seqs)
    taken = (engine.memory or hardware.engine_memory) * hardware.memory + hardware.context
    if section.first_gpu is None:  # every engine begins at the first one that it sees
        return engine.gpus, section.engines * taken
    return section.engines * engine.gpus, taken


def _full(shape: Shape, engine: Engine, counts: Counts, longest: int, hardware: Hardware) -> Finding:
    weights = engine_weights(shape, engine, counts) / GIB
    limit = hardware.memory * (engine.memory or hardware.engine_memory) / GIB
    room = max(0, cache_tokens(shape, engine, counts, hardware) // engine.copies)
    return Finding(
        "does not fit",
        f"an engine of {counted(engine.gpus, 'GPU')} holds {weights:.1f} GiB of weights on each, of {limit:.1f} that "
        f"vLLM takes; its cache has room for {room:,} tokens, but one sample can have {longest:,}: give `arguments` a "
        'larger "--tensor-parallel-size", or "--quantization=fp8_per_block"',
    )


def plan_servers(
    shape: Shape, sections: Sequence[Any], counts: Counts, hardware: Hardware
) -> tuple[int, list[Finding]]:
    """GPUs of the reward models of a run, and what is wrong with them. They are taken to be as large as the policy.

    Args:
        shape: the policy's.
        sections: each of [reward_models].
        counts: of the policy.
        hardware: where.
    """
    gpus, findings = 0, []
    for section in sections:
        engine = engine_of(section.arguments, section.max_num_seqs)
        gpus += engine.gpus
        longest = section.max_model_len or 1
        if cache_tokens(shape, engine, counts, hardware) < longest:
            findings.append(_full(shape, engine, counts, longest, hardware))
    return gpus, findings
