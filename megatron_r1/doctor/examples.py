"""Which of the examples this machine can run."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_r1.doctor.finding import Finding
from megatron_r1.doctor.gpus import Gpus
from megatron_r1.doctor.machine import Machine
from megatron_r1.wording import counted

TABLE = Path(__file__).with_name("examples.toml")
_SLACK = 0.95
"""A machine sold with so many GiB shows a little less."""


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    command: str
    runs: bool
    why: str
    """What is not enough, or how long it takes."""


@cache
def table() -> list[dict[str, Any]]:
    """The rows of examples.toml."""
    rows: list[dict[str, Any]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))["example"]
    return rows


def verdicts(machine: Machine, gpus: Gpus, findings: list[Finding]) -> list[Verdict]:
    """Each example, and whether it can run here."""
    broken = [finding.name for finding in findings if finding.state == "bad"]
    engine = not any(finding.state != "ok" and "engine" in finding.serves for finding in findings)
    return [_verdict(row, machine, gpus, broken, engine) for row in table()]


def of_file(path: Path, machine: Machine, gpus: Gpus) -> list[Finding]:
    """What the table says of an example that is for GPUs, if the file is one."""
    root = Path(__file__).resolve().parents[2]
    for row in table():
        named = [(root / word).resolve() for word in row["command"].split() if word.endswith(".toml")]
        if row["needs"].get("gpus") and path.resolve() in named:
            found = _verdict(row, machine, gpus, [], engine=True)
            text = found.why or f"{row['needs']['gpus']:,} GPUs"
            fix = f"start it where they are ({row['from']})"
            return [Finding("run file", "example", "ok" if found.runs else "bad", text, fix)]
    return []


def _verdict(row: dict[str, Any], machine: Machine, gpus: Gpus, broken: list[str], engine: bool) -> Verdict:
    needs = row["needs"]
    memory = min((gpu.memory for gpu in gpus.all), default=0.0)
    short = [f"bad: {broken[0]}"] if broken else []
    if needs.get("engine") and not engine:
        short.append("no rollout engine can start")
    if machine.memory < _SLACK * needs.get("memory", 0.0):
        untried = "the machine" in row["from"]
        short.append(f"memory {machine.memory:.1f} of {needs['memory']:g} GiB" + (": untried" if untried else ""))
    if machine.disk < needs.get("disk", 0.0):
        short.append(f"disk {machine.disk:.0f} of {needs['disk']:g} GiB")
    if len(gpus.all) < needs.get("gpus", 0):
        nodes = f" ({needs['gpus'] // 8} nodes of 8)" if needs["gpus"] > 8 else ""
        short.append(f"{len(gpus.all)} of {counted(needs['gpus'], 'GPU')}{nodes}")
    elif memory < _SLACK * needs.get("gpu_memory", 0.0):
        short.append(f"GPUs of {memory:.0f} GiB, not {needs['gpu_memory']:g}")
    taken = f"about {row['minutes']} minutes on two cores" if "minutes" in row else ""
    return Verdict(row["command"], not short, "; ".join(short) or taken)
