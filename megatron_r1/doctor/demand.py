"""What a run file or a recipe asks of the machine, read from its TOML alone.

The planner, in a process of its own, says how much memory a run file of `pretrain`, `sft` or `rl` takes.
"""

import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.doctor.finding import Finding
from megatron_r1.doctor.gpus import Gpus
from megatron_r1.doctor.machine import GIB, PORT, Machine
from megatron_r1.errors import ConfigError
from megatron_r1.wording import counted

PART = "run file"
PLAN_SECONDS = 300.0
_PLANNED = {"corpus", "rollout", "data"}
_ENGINES = {"rollout", "reward_models"}
_FILES = ("file", "extends")
"""Keys of recipes that name another TOML file."""
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
    planned: bool
    """Is it one that the planner takes?"""


def read(path: Path) -> Demand:
    """What a file asks for.

    Raises:
        ConfigError: it, or one that it names, cannot be read.
    """
    tree = _load(path)
    tables = list(_tables(tree, path.parent))
    serves = frozenset(word for table in tables for word in _words(table))
    ports = [table["rollout"]["port"] for table in tables if "port" in _table(table, "rollout")]
    layouts = [table["parallel"] for table in tables if _table(table, "parallel")]
    total = max(map(_total, layouts), default=1)
    processes = max((int(layout.get("processes") or _fewest(layout)) for layout in layouts), default=1)
    planned = "stages" not in tree and bool(_PLANNED & set(tree)) and "model" in tree
    return Demand(serves, min(ports, default=PORT), processes, total, planned)


def findings(path: Path, demand: Demand, machine: Machine, gpus: Gpus) -> list[Finding]:
    """Whether what it asks for is here."""
    found = [_processes(demand, len(gpus.all))]
    return [*found, _memory(path, demand, machine, gpus)] if demand.planned else found


def _processes(demand: Demand, here: int) -> Finding:
    """The trainer's, beside the GPUs of this machine."""
    needed = max(demand.processes, demand.total)
    text = f"{needed} of the trainer" + (f", {counted(here, 'GPU')} here" if here else "")
    if not here or needed <= here:
        return Finding(PART, "processes", "ok", text)
    nodes = math.ceil(needed / here)
    return Finding(
        PART, "processes", "bad", text, f"start it on {nodes} such nodes (docs/slurm.md), or make [parallel] smaller"
    )


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
        return Finding(PART, name, "note", f"there is no plan: {said}", f"megatron-r1 plan {path}")
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


def _words(table: dict[str, Any]) -> Iterator[str]:
    """What one table asks for."""
    if any(key in table and not _table(table, key).get("addresses") for key in _ENGINES):
        yield "engine"
    if table.get("type") in {"code", "python"} and table.get("sandbox", "bubblewrap") == "bubblewrap":
        yield "code"
    if table.get("verb") == "quantize":
        yield "modelopt"
    kernels = _table(table, "kernels")
    if kernels.get("layers") == "transformer_engine" or "fp8" in table:
        yield from ("transformer_engine", "gpu")
    if kernels.get("gradient_accumulation_fusion") is True:
        yield "apex"
    if kernels.get("dispatcher") in {"deepep", "hybridep"}:
        yield "deep_ep"


def _total(section: dict[str, Any]) -> int:
    """Processes on all nodes: as many as it says, else the fewest."""
    return max(_fewest(section), section.get("nodes", 1) * section.get("processes", 1))


def _fewest(section: dict[str, Any]) -> int:
    """As `config.sections.ParallelSection` counts them."""
    size = {name: section.get(name, 1) for name in ("tensor", "context", "expert", "expert_tensor", "pipeline")}
    return math.lcm(size["tensor"] * size["context"], size["expert"] * size["expert_tensor"]) * int(size["pipeline"])


def _tables(tree: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """A table and all below it; a stage's run file stands for it."""
    yield tree
    for value in tree.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _tables(inner, folder)
    for key in _FILES:
        file = tree.get(key)
        if isinstance(file, str) and file.endswith(".toml"):
            yield from _tables(_load(folder / file), (folder / file).parent)


def _table(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the run file {path}: {error}") from error
