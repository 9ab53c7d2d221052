"""A run file and options to the whole plan: one object that the table, the page and JSON show."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from packaging.version import Version

from megatron_r1.config.plan import PlanSection
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.context_extension import extended
from megatron_r1.model.family import HFConfig
from megatron_r1.model.flops import Flops, training_flops
from megatron_r1.model.hf_folder import QUANTIZATION, read_config
from megatron_r1.model.kernel_rules import RULES
from megatron_r1.model.kernel_rules import Setting as KernelSetting
from megatron_r1.model.kernels import Machine, choose
from megatron_r1.model.layout_check import options_of
from megatron_r1.model.memory import Shape
from megatron_r1.model.scalar_head import as_classifier
from megatron_r1.optim.optimizer_rules import OPTIM_RULES
from megatron_r1.plan.fleet import FleetPlan, on_trainers_gpus, plan_fleet, plan_servers
from megatron_r1.plan.hardware import H100, Hardware
from megatron_r1.plan.layouts import Finding, illegal, too_long, uneven, unwise
from megatron_r1.plan.memory import MemoryPlan, RankMemory, Setting
from megatron_r1.plan.movement import Transfer, checkpoint
from megatron_r1.plan.run_file import Load, Run, load_of, longest, processes, reference, refuse_unplanned
from megatron_r1.plan.search import Candidate, Searched, search
from megatron_r1.plan.state import Precision, States
from megatron_r1.plan.tensors import Counts, count
from megatron_r1.plan.training import Manner, StepTime, TrainingTime

GIB = 2**30
GPUS = Machine(cuda=(13, 0), capability=(9, 0), transformer_engine=Version("2.11"), head_fusion=True, deep_ep=True)
"""H100s with all that docs/h100.md installs."""


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    verb: str
    run: Run
    options: PlanSection
    hardware: Hardware
    hf: HFConfig
    counts: Counts
    gpus: int
    """Of the trainer."""
    load: Load
    microbatches: int
    """Of an update, on each rank."""
    flops_per_token: Flops
    """Of training, at the length that tokens see."""
    findings: list[Finding]
    memory: list[RankMemory]
    """Of distinct ranks; empty where the layout is illegal."""
    update: StepTime | None
    scoring: float
    """Seconds of a step's forward passes besides training."""
    fleet: FleetPlan | None
    served_gpus: int
    """Of reward models."""
    saved: Transfer | None
    host: dict[str, float]
    """Bytes on the fullest node."""
    found: list[Candidate]

    @property
    def step_seconds(self) -> float | None:
        """Of one step: for `rl` a rollout with its updates."""
        if not self.update:
            return None
        own = self.update.seconds * self.load.updates + self.scoring
        if not self.fleet:
            return own
        return max(own, self.fleet.seconds) if self.ahead else own + self.fleet.seconds

    @property
    def ahead(self) -> bool:
        """Whether the fleet samples while the trainer trains."""
        return isinstance(self.run, RLConfig) and self.run.rollout.max_staleness > 0

    @property
    def all_gpus(self) -> int:
        """With those of the fleet and of reward models."""
        return self.gpus + self.fleet_gpus + self.served_gpus

    @property
    def fleet_gpus(self) -> int:
        """That only engines of the fleet have."""
        if not (self.fleet and isinstance(self.run, RLConfig)):
            return 0
        shared, _ = on_trainers_gpus(self.run.rollout, self.hardware)
        return max(0, shared - self.gpus) if shared else self.fleet.gpus

    @property
    def gpu_hours(self) -> float | None:
        """Of all steps; None where a run's length is in epochs of data that are not known."""
        seconds = self.step_seconds
        return seconds * self.load.steps * self.all_gpus / 3600 if seconds and self.load.steps else None


def plan(
    verb: str,
    run: Run,
    options: PlanSection,
    hardware: Hardware = H100,
    searching: bool = False,
    hf: HFConfig | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        verb: what it is a run of.
        run: its run file.
        options: what that does not say.
        hardware: where.
        searching: for faster layouts, too.
        hf: the model's `config.json`; None = the one in its folder.

    Raises:
        ConfigError: low-rank adapters, a critic.
        DataError: an unreadable or unsupported `config.json`.
    """
    refuse_unplanned(run)
    gpus, load = options.gpus or processes(run.parallel), load_of(run, options)
    stored = hf or read_config(run.model.path)
    hf = _as_trained(run, stored)
    shape, counts = Shape.of(hf, run.model), _counts(*_key(hf, run.model))
    precision = Precision.of(run.model.dtype, run.optim)
    setting, manner = _setting(run, precision, hardware), _manner(run, load, precision, hardware)
    over = Searched(hf, run.model, run.parallel, gpus, load, counts, precision, setting, manner, hardware)
    findings = [*too_long(hf, longest(run)), *illegal(shape, hf, run.parallel, gpus), *_unservable(run, stored)]
    findings += [*_refused(run, hf), *uneven(run.parallel, gpus, load)]
    own = _Trained() if any(finding.kind == "illegal" for finding in findings) else _trained(over, shape)
    fleet, served = _fleet(shape, run, options, counts, gpus, own, hardware) if isinstance(run, RLConfig) else (None, 0)
    own.findings += _host_full(own.host, hardware)
    length = round(load.attended or load.length)
    return Plan(
        verb=verb,
        run=run,
        options=options,
        hardware=hardware,
        hf=hf,
        counts=counts,
        gpus=gpus,
        load=load,
        microbatches=load.work(run.parallel, gpus).microbatches,
        flops_per_token=training_flops(shape.config, shape.outputs, [length]) * (1 / length),
        findings=findings + own.findings,
        memory=own.memory,
        update=own.update,
        scoring=own.scoring,
        fleet=fleet,
        served_gpus=served,
        saved=own.saved,
        host=own.host,
        found=search(over) if searching else [],
    )


@dataclass
class _Trained:
    """What is known of a trainer whose layout is legal."""

    memory: list[RankMemory] = field(default_factory=list)
    update: StepTime | None = None
    scoring: float = 0.0
    saved: Transfer | None = None
    host: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def _trained(of: Searched, shape: Shape) -> _Trained:
    load, parallel, gpus, hardware = of.load, of.parallel, of.gpus, of.hardware
    work = load.work(parallel, gpus)
    states = _states(*_key(of.hf, of.model), parallel, gpus, of.precision)
    memory = MemoryPlan(shape, parallel, work, of.setting, hardware).ranks(states)
    timed = TrainingTime(shape, parallel, work, of.manner, hardware)
    host = _host(memory, hardware, gpus)
    return _Trained(
        memory=memory,
        update=timed.step(max((state for _, _, state in states.distinct()), key=lambda one: one.gradients)),
        scoring=load.scorings * timed.scoring(work.microbatches * load.updates) if load.scorings else 0.0,
        saved=checkpoint(
            of.counts.main + of.counts.mtp,
            of.precision.weight + of.precision.kept,
            max(1, gpus // hardware.gpus_per_node),
            hardware,
        ),
        host=host,
        findings=[
            *unwise(shape, parallel, gpus, work.microbatches, hardware.gpus_per_node),
            *_too_full(memory, hardware),
        ],
    )


def _fleet(
    shape: Shape, run: RLConfig, options: PlanSection, counts: Counts, gpus: int, own: _Trained, hardware: Hardware
) -> tuple[FleetPlan, int]:
    """The fleet and the GPUs of reward models; what they need of the trainer, and what is wrong, goes to `own`."""
    made = plan_fleet(shape, run, options, counts, gpus, hardware)
    served, wrong = plan_servers(shape, list(run.reward_models.values()), counts, hardware)
    own.host |= {"weights for the engines": made.sync.host} if made.sync.host else {}
    own.findings += made.findings + wrong
    return made, served


def _as_trained(run: Run, hf: HFConfig) -> HFConfig:
    """The model's `config.json` with a longer context, with a scalar head."""
    if run.model.context:
        hf = extended(hf, run.model.context)
    return as_classifier(hf) if isinstance(run, RewardModelConfig) else hf


_DEPENDED = {"path", "dtype", "mtp_loss_coef", "bias_update_rate"}
"""Keys of [model] that a model's tensors depend on, and the path, which there has to be."""


def _key(hf: HFConfig, section: ModelSection) -> tuple[str, str]:
    """What two runs of the same model share: stages of a recipe train one again and again."""
    return json.dumps(hf), section.model_copy(update={"path": Path()}).model_dump_json(include=_DEPENDED)


def _shape(hf: str, section: str) -> Shape:
    return Shape.of(json.loads(hf), ModelSection.model_validate_json(section))


@lru_cache(maxsize=8)
def _counts(hf: str, section: str) -> Counts:
    return count(_shape(hf, section))


@lru_cache(maxsize=4)
def _states(hf: str, section: str, parallel: ParallelSection, gpus: int, precision: Precision) -> States:
    return States(_shape(hf, section), parallel, gpus, precision)


def _setting(run: Run, precision: Precision, hardware: Hardware) -> Setting:
    fp8 = run.model.fp8
    shared, engine = on_trainers_gpus(run.rollout, hardware) if isinstance(run, RLConfig) else (0, 0.0)
    return Setting(
        fused=choose(run.model, GPUS).fused,
        # Matrices in rows and in columns; where these are the weights themselves, they are as large as in bfloat16.
        eight=2 if fp8 and not fp8.parameters else 0,
        transport=run.rollout.chosen_transport if isinstance(run, RLConfig) else "",
        transfer_buffer=run.rollout.transfer_buffer_gib * GIB if isinstance(run, RLConfig) else 0.0,
        shared_gpus=shared,
        engine=engine,
        sleeps=isinstance(run, RLConfig) and run.rollout.sleep,
        reference=reference(run),
        asynchronous=run.checkpoint.asynchronous,
        offload=run.optim.offload,
        kept=precision.kept,
    )


def _manner(run: Run, load: Load, precision: Precision, hardware: Hardware) -> Manner:
    kernels = choose(run.model, GPUS).options
    return Manner(
        precision="fp8" if run.model.fp8 else run.model.dtype,
        dispatcher="alltoall" if kernels["dispatcher"] == "alltoall" else "deepep",
        overlap=hardware.hidden if kernels["overlap_expert_exchange"] else 0.0,
        attended=load.attended,
        offload=run.optim.offload,
        kept=precision.kept,
    )


def _unservable(run: Run, hf: HFConfig) -> list[Finding]:
    """What `train/learner.py` would refuse."""
    if not (isinstance(run, RLConfig) and hf.get(QUANTIZATION)):
        return []
    path = run.model.path
    text = (
        f"model.path: {path} holds quantised weights, but engines are sent unquantised ones: make a folder of bfloat16 "
        f'with `megatron-r1 cast {path} FOLDER`, in a recipe by a stage of the verb "cast", and name that one'
    )
    return [Finding("illegal", text)]


def _refused(run: Run, hf: HFConfig) -> list[Finding]:
    """What `model/kernel_rules.py` and `optim/optimizer_rules.py` would refuse on the machines."""
    asked = KernelSetting(
        section=run.model,
        kernels=choose(run.model, GPUS),
        machine=GPUS,
        hf=hf,
        layout=options_of(run.parallel),
        scalar=isinstance(run, RewardModelConfig),
        optim=run.optim,
    )
    rules = [*RULES, *(OPTIM_RULES if run.optim.precision_aware else [])]
    return [Finding("illegal", rule.said) for rule in rules if rule.holds(asked)]


def _host(memory: list[RankMemory], hardware: Hardware, gpus: int) -> dict[str, float]:
    """Of a node whose ranks are all like the one that keeps most there."""
    fullest = max(memory, key=lambda rank: sum(rank.host.values()))
    return {name: size * min(gpus, hardware.gpus_per_node) for name, size in fullest.host.items()}


def _too_full(memory: list[RankMemory], hardware: Hardware) -> list[Finding]:
    found = []
    fullest = max(memory, key=lambda rank: max(rank.peaks.values()))
    phase, peak = max(fullest.peaks.items(), key=lambda item: item[1])
    if peak > hardware.memory:
        parts = sorted(fullest.parts.items(), key=lambda item: -item[1])
        sizes = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size > 0.05 * GIB)
        found.append(
            Finding(
                "does not fit",
                f"rank {fullest.rank} (stage {fullest.stage}) needs {peak / GIB:.1f} GiB at {phase} of "
                f"{hardware.memory / GIB:.1f}: {sizes}, and {hardware.lost:.0%} lost to fragmentation",
            )
        )
    return found


def _host_full(host: dict[str, float], hardware: Hardware) -> list[Finding]:
    if sum(host.values()) <= hardware.host_memory:
        return []
    sizes = " + ".join(f"{name} {size / GIB:,.0f}" for name, size in host.items())
    text = f"the first node's host needs {sizes} GiB of {hardware.host_memory / GIB:,.0f}"
    return [Finding("does not fit", text)]


def refuse_illegal(made: Plan) -> None:
    """Raises `ConfigError` where a run could not be started."""
    for finding in made.findings:
        if finding.kind == "illegal":
            raise ConfigError(f"[parallel]: {finding.text}")


def as_dict(made: Plan) -> dict[str, Any]:
    """The plan for JSON; bytes, seconds and FLOP."""
    update, fleet = made.update, made.fleet
    return {
        "verb": made.verb,
        "model": made.hf["architectures"][0],
        "parameters": made.counts.main,
        "mtp_parameters": made.counts.mtp,
        "gpus": made.all_gpus,
        "trainer_gpus": made.gpus,
        "parallel": made.run.parallel.model_dump(mode="json"),
        "hardware": {"name": made.hardware.name, "memory": made.hardware.memory, "sources": made.hardware.sources},
        "findings": [{"kind": finding.kind, "text": finding.text} for finding in made.findings],
        "fits": not any(finding.kind != "unwise" for finding in made.findings),
        "flops_per_token": made.flops_per_token.total,
        "microbatches": made.microbatches,
        "memory": [_rank_dict(rank) for rank in made.memory],
        "host": made.host,
        "update": update
        and {
            "seconds": update.seconds,
            "parts": {name: value for name, value in vars(update.parts).items() if value},
            "tokens": update.tokens,
            "tokens_per_second_per_gpu": update.tokens_per_gpu,
            "tflops_per_gpu": update.flops_per_gpu / 1e12,
        },
        "scoring_seconds": made.scoring,
        "rollout": fleet and fleet.as_dict(),
        "step_seconds": made.step_seconds,
        "steps": made.load.steps or None,
        "checkpoint": made.saved and vars(made.saved),
        "gpu_hours": made.gpu_hours,
        "cost": made.gpu_hours * made.options.price if made.gpu_hours and made.options.price else None,
        "search": [candidate.row() for candidate in made.found],
    }


def _rank_dict(rank: RankMemory) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "ranks": rank.ranks,
        "stage": rank.stage,
        "parameters": rank.parameters,
        "parts": rank.parts,
        "activations": rank.activations,
        "peaks": rank.peaks,
        "host": rank.host,
    }
