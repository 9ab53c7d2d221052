"""What a run file or a recipe asks of the machine, read from its TOML alone.

The planner, in a process of its own, says how much memory a run file of `pretrain`, `sft` or `rl` takes.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.engine_arguments import ranks
from megatron_r1.doctor.finding import Finding
from megatron_r1.doctor.gpus import Gpus
from megatron_r1.doctor.machine import GIB, PORT, Machine
from megatron_r1.doctor.tables import Tree, every, runs, table
from megatron_r1.wording import counted

PART = "run file"
PLAN_SECONDS = 300.0
CROWD = 4
"""Processes that may take turns on a core before a run is taken to be one for other machines (our choice)."""
_ENGINES = {"rollout", "reward_models"}
_MODELS = ("models", "reward_models")
"""Tables of models by name."""
_ON_GPU = ("context", "communication")
"""Parts of a plan that a run on CPU has not."""


@dataclass(frozen=True)
class Demand:
    """Of one file, and of those that it names."""

    serves: frozenset[str]
    """Words of `Finding.serves`."""
    port: int
    processes: int
    """Of the trainer on a node, where the file says so; else all that its layout needs."""
    total: int
    """Processes of the trainer on all nodes."""
    engine_gpus: int
    """GPUs of a node up to the last that `rollout.first_gpu` leaves to engines."""
    models: frozenset[str]
    """Folders that have to be there, and that no stage makes."""
    planned: bool
    """Is it one that the planner takes?"""


def read(path: Path) -> Demand:
    """What a file asks for.

    Raises:
        ConfigError: it, or one that it names, cannot be read.
    """
    files = runs(path)
    tables = [each for file in files for each in every(file)]
    layouts = [section for each in tables if (section := table(each, "parallel"))]
    return Demand(
        serves=frozenset(word for each in tables for word in _words(each)),
        port=min((each["rollout"]["port"] for each in tables if "port" in table(each, "rollout")), default=PORT),
        processes=max((int(layout.get("processes") or _fewest(layout)) for layout in layouts), default=1),
        total=max(map(_total, layouts), default=1),
        engine_gpus=max(map(_engine_gpus, tables), default=0),
        models=frozenset(model for each in tables for model in _models(each) if not model.startswith("@")),
        planned=len(files) == 1 and _planned(files[0]),
    )


def findings(path: Path, demand: Demand, machine: Machine, gpus: Gpus) -> list[Finding]:
    """Whether what it asks for is here."""
    missing = sorted(model for model in demand.models if not (Path(model).expanduser() / "config.json").is_file())
    found = [_processes(demand, machine, len(gpus.all))]
    if gpus.all and demand.engine_gpus:
        found.append(_engines(demand, len(gpus.all)))
    if demand.models:
        found.append(_presence(demand, missing))
    return [*found, _memory(path, demand, machine, gpus)] if demand.planned and not missing else found


def _processes(demand: Demand, machine: Machine, here: int) -> Finding:
    """The trainer's, beside the GPUs of this machine, or beside its cores where it has none."""
    name, needed = "processes", max(demand.processes, demand.total)
    text = f"{needed:,} of the trainer, " + (
        f"{counted(here, 'GPU')} here" if here else f"{machine.cores:g} cores here, no GPU"
    )
    if here and needed > here:
        fix = f"start it on {math.ceil(needed / here)} such nodes (docs/slurm.md), or make [parallel] smaller"
        return Finding(PART, name, "bad", text, fix)
    if here or needed <= machine.cores or needed == 1:
        return Finding(PART, name, "ok", text)
    if needed <= CROWD * machine.cores:
        return Finding(PART, name, "note", f"{text}: they take turns", "make [parallel] smaller")
    return Finding(PART, name, "bad", text, "start it on machines with as many GPUs, or make [parallel] smaller")


def _engines(demand: Demand, here: int) -> Finding:
    text = f"GPUs up to number {demand.engine_gpus - 1} from rollout.first_gpu on, {here} here"
    if demand.engine_gpus <= here:
        return Finding(PART, "GPUs of engines", "ok", text)
    return Finding(PART, "GPUs of engines", "bad", text, "lower rollout.engines or rollout.first_gpu")


def _presence(demand: Demand, missing: list[str]) -> Finding:
    """Of the folders of models."""
    if not missing:
        return Finding(PART, "models", "ok", f"{len(demand.models)} there")
    fix = "put a Hugging Face folder there (a path in runs/ is what an earlier run writes: see the head of the file)"
    return Finding(PART, "models", "bad", f"no config.json in {', '.join(missing)}", f"{fix}, or name another one")


def _memory(path: Path, demand: Demand, machine: Machine, gpus: Gpus) -> Finding:
    """The fullest rank at its peak, as planned, beside what is here."""
    name = "memory, planned"
    command = [sys.executable, "-m", "megatron_r1.cli", "plan", str(path), "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PLAN_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(PART, name, "note", f"no plan in {PLAN_SECONDS:g} s", f"megatron-r1 plan {path}")
    try:
        plan = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return Finding(PART, name, "bad", f"there is no plan: {said}", "mend the run file as it says")
    if not plan["memory"]:
        illegal = "; ".join(one["text"] for one in plan["findings"] if one["kind"] == "illegal")
        return Finding(PART, name, "bad", f"there is no plan: {illegal}", f"megatron-r1 plan {path} says all of it")
    if gpus.all:
        need, room = max(_peak(rank, ()) for rank in plan["memory"]), min(gpu.memory for gpu in gpus.all)
        what = "of a GPU"
    else:
        each = max(_peak(rank, _ON_GPU) for rank in plan["memory"])
        need, room = each * demand.processes, machine.memory
        what = f"for {counted(demand.processes, 'process', 'processes')}, engines besides"
    text = f"{need:.1f} GiB {what}, {room:.1f} here"
    if need <= room:
        return Finding(PART, name, "ok", text)
    return Finding(PART, name, "bad", text, f"megatron-r1 plan {path} --gpus N --search shows layouts that fit")


def _peak(rank: dict[str, Any], without: tuple[str, ...]) -> float:
    """GiB."""
    peak = max(rank["peaks"].values()) - sum(rank["parts"].get(name, 0.0) for name in without)
    return float(peak) / GIB


def _words(tree: Tree) -> Iterator[str]:
    """What one table asks for."""
    if any(key in tree and not table(tree, key).get("addresses") for key in _ENGINES):
        yield "engine"
    rollout = table(tree, "rollout")
    if "first_gpu" in rollout or rollout.get("sleep") or rollout.get("transport") in {"nccl", "ipc"}:
        yield "gpu"
    if tree.get("type") in {"code", "python"} and tree.get("sandbox", "bubblewrap") == "bubblewrap":
        yield "code"
    if tree.get("verb") == "quantize":
        yield "modelopt"
    kernels = table(tree, "kernels")
    if kernels.get("layers") == "transformer_engine" or "fp8" in tree:
        yield from ("transformer_engine", "gpu")
    if kernels.get("gradient_accumulation_fusion") is True:
        yield "apex"
    if kernels.get("dispatcher") in {"deepep", "hybridep"}:
        yield "deep_ep"


def _models(tree: Tree) -> Iterator[str]:
    """Folders of models that one table names."""
    named = [table(tree, "model"), *(inner for key in _MODELS for inner in table(tree, key).values())]
    for model in named:
        if isinstance(model, dict) and isinstance(model.get("path"), str) and "address" not in model:
            yield model["path"]


def _engine_gpus(tree: Tree) -> int:
    """Of a node, up to the last of those that the table's [rollout] gives to engines."""
    rollout = table(tree, "rollout")
    if "first_gpu" not in rollout:
        return 0
    return int(rollout["first_gpu"] + rollout.get("engines", 1) * math.prod(ranks(rollout.get("arguments", []))))


def _planned(tree: Tree) -> bool:
    """Has it the keys of a verb that trains, and neither low-rank adapters nor a critic, which no plan counts?"""
    trains = "corpus" in tree or "data" in tree
    return trains and "model" in tree and "critic" not in tree and "lora" not in table(tree, "model")


def _total(section: Tree) -> int:
    """Processes on all nodes: as many as it says, else the fewest."""
    return max(_fewest(section), section.get("nodes", 1) * section.get("processes", 1))


def _fewest(section: Tree) -> int:
    """As `config.sections.ParallelSection` counts them."""
    size = {name: section.get(name, 1) for name in ("tensor", "context", "expert", "expert_tensor", "pipeline")}
    return math.lcm(size["tensor"] * size["context"], size["expert"] * size["expert_tensor"]) * int(size["pipeline"])
