"""Layouts of so many GPUs that fit into memory, the fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_r1.config.recompute import MemorySection
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.family import HFConfig
from megatron_r1.model.memory import Shape
from megatron_r1.plan.hardware import Hardware
from megatron_r1.plan.layouts import balanced, illegal, uneven
from megatron_r1.plan.memory import MemoryPlan, Setting
from megatron_r1.plan.run_file import Load
from megatron_r1.plan.state import Precision, State, States
from megatron_r1.plan.tensors import Counts
from megatron_r1.plan.training import Manner, StepTime, TrainingTime

_TENSOR = (1, 2, 4, 8)
_PIPELINE = (1, 2, 4, 8, 12, 16, 32)
_VIRTUAL = (1, 2, 4)
_EXPERT = (1, 2, 4, 8, 16, 32, 64)
_SHOWN = 10


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    parallel: ParallelSection
    memory: MemorySection
    time: StepTime
    peak: float
    """Bytes of the fullest rank in its worst phase."""

    def row(self) -> dict[str, Any]:
        """For JSON and tables."""
        own = self.parallel
        return {
            "tensor": own.tensor,
            "pipeline": own.pipeline,
            "virtual_pipeline": own.virtual_pipeline,
            "pipeline_layout": own.pipeline_layout,
            "expert": own.expert,
            "context": own.context,
            "recompute": [self.memory.recompute, *self.memory.recompute_modules],
            "step_seconds": self.time.seconds,
            "tokens_per_second_per_gpu": self.time.tokens_per_gpu,
            "tflops_per_gpu": self.time.flops_per_gpu / 1e12,
            "peak_bytes": self.peak,
        }


@dataclass(frozen=True)
class Searched:
    """What a search is over."""

    hf: HFConfig
    model: ModelSection
    parallel: ParallelSection
    """Whose context and expert_tensor are kept."""
    gpus: int
    load: Load
    counts: Counts
    precision: Precision
    setting: Setting
    manner: Manner
    hardware: Hardware


def search(over: Searched) -> list[Candidate]:
    """The fastest that fit. Times are estimated of all; memory is counted from the fastest on until enough fit."""
    timed = sorted(_timed(over), key=lambda one: one[2].seconds)
    found: list[Candidate] = []
    for parallel, memory, time in timed:
        if len(found) == _SHOWN:
            break
        shape = _shape(over, memory)
        states = States(shape, parallel, over.gpus, over.precision)
        work = over.load.work(parallel, over.gpus)
        ranks = MemoryPlan(shape, parallel, work, over.setting, over.hardware).ranks(states)
        peak = max(max(rank.peaks.values()) for rank in ranks)
        if peak <= over.hardware.memory:
            found.append(Candidate(parallel, memory, time, peak))
    return found


def _timed(over: Searched) -> Iterator[tuple[ParallelSection, MemorySection, StepTime]]:
    for memory in _memories(over):
        shape = _shape(over, memory)
        for parallel in _legal(over, shape):
            work = over.load.work(parallel, over.gpus)
            if _hopeless(over, parallel):
                continue
            estimate = TrainingTime(shape, parallel, work, over.manner, over.hardware)
            yield parallel, memory, estimate.step(_about(over, parallel))


def _shape(over: Searched, memory: MemorySection) -> Shape:
    return Shape.of(over.hf, over.model.model_copy(update={"memory": memory}))


def _memories(over: Searched) -> list[MemorySection]:
    """As configured, the usual selection, and whole layers."""
    modules = ["layernorm", "mla_up_proj"] if "kv_lora_rank" in over.hf else ["layernorm"]
    more = [*modules, "moe" if over.counts.routed else "mlp"]
    selective = [
        MemorySection.model_validate({"recompute": "selective", "recompute_modules": names})
        for names in (modules, more)
    ]
    choices = [over.model.memory, *selective, MemorySection(recompute="full")]
    return list({choice.model_dump_json(): choice for choice in choices}.values())


def _legal(over: Searched, shape: Shape) -> Iterator[ParallelSection]:
    experts = shape.config.num_moe_experts or 0
    for tensor, pipeline, virtual, expert in product(_TENSOR, _PIPELINE, _VIRTUAL, _EXPERT if experts else (1,)):
        parts = pipeline * virtual
        if (virtual > 1 and pipeline == 1) or parts > shape.config.num_layers:
            continue
        changed = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "expert": expert}
        own = over.parallel.model_copy(update=changed | {"pipeline_layout": None})
        if pipeline > 1:
            own = own.model_copy(update={"pipeline_layout": balanced(shape, parts)})
        findings = [*illegal(shape, over.hf, own, over.gpus)]
        if not findings and not [one for one in uneven(own, over.gpus, over.load) if one.kind == "illegal"]:
            yield own


def _hopeless(over: Searched, parallel: ParallelSection) -> bool:
    """Whether weights and gradients of the average rank alone do not fit."""
    state = _about(over, parallel)
    optimizer = state.optimizer * (1 - over.manner.offload)
    return state.weights + state.gradients + optimizer > over.hardware.memory


def _about(over: Searched, parallel: ParallelSection) -> State:
    """The average rank's state, without counting it tensor by tensor."""
    own, counts = over.precision, over.counts
    stages = parallel.pipeline
    numbers = (counts.dense / (parallel.tensor * stages), counts.routed / (stages * parallel.expert))
    copies = (over.gpus / (parallel.tensor * stages), over.gpus / (stages * parallel.expert))
    kept = sum(number / copy for number, copy in zip(numbers, copies, strict=True))
    total = int(sum(numbers))
    return State(total, total * own.weight, total * own.gradient, int(kept * own.kept))
