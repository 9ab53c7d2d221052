"""PPO beside GRPO on the same task: accuracy, time and memory of both, as a table and as JSON.

Runs `examples/ppo_vs_grpo/{grpo,ppo}.toml` one after the other (what is finished is not run again, what was killed goes
on), then compares what they left. Overrides of the `rl` verb may be given, for example `--seed=1 --rollout.port=9000`.
Ends with `runs/ppo_vs_grpo/summary.json`.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

EXAMPLE = Path("examples/ppo_vs_grpo")
OUTPUT = Path("runs/ppo_vs_grpo")
NAMES = ("grpo", "ppo")
GIB = 2**30
PHASES = ("rollout", "logprobs", "update")


def main() -> int:
    """Run and compare. Returns the exit code of the first run that fails."""
    overrides = sys.argv[1:]
    for name in NAMES:
        if not (OUTPUT / name / "summary.json").exists() and (code := run(name, overrides)):
            return code
    compared = {name: figures(OUTPUT / name) for name in NAMES}
    partial = OUTPUT / "summary.json.partial"
    partial.write_text(json.dumps(compared, indent=2) + "\n")
    partial.replace(OUTPUT / "summary.json")
    Console().print(table(compared))
    return 0


def run(name: str, overrides: list[str]) -> int:
    """`megatron-r1 rl` in a process of its own, whose largest resident set is kept beside its output."""
    command = [sys.executable, "-m", "megatron_r1.cli", "rl", str(EXAMPLE / f"{name}.toml"), *overrides]
    kept = OUTPUT / f"{name}_peak.json"
    peak = json.loads(kept.read_text()) if kept.exists() else 0
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        trainer = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                try:
                    process.wait(1.0)
                except subprocess.TimeoutExpired:
                    peak = max(peak, trainer.memory_info().rss)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            OUTPUT.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(peak))
        return process.returncode


def figures(output: Path) -> dict[str, Any]:
    """What a finished run is compared by."""
    summary = json.loads((output / "summary.json").read_text())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    kept = output.with_name(f"{output.name}_peak.json")
    return {
        "heldout_accuracy": {row["step"]: row["heldout_accuracy"] for row in rows if row["kind"] == "evaluation"},
        "accuracy_last_steps": statistics.fmean(row["accuracy"] for row in steps[-5:]),
        "seconds": summary["seconds_total"],
        "seconds_of_a_step": statistics.median(row["seconds"] for row in steps),
        **{f"seconds_of_{phase}": statistics.median(row[f"seconds/{phase}"] for row in steps) for phase in PHASES},
        "policy_bytes": summary["policy_bytes"],
        "critic_bytes": summary.get("critic_bytes", 0),
        "trainer_peak_gib": json.loads(kept.read_text()) / GIB if kept.exists() else None,
    }


def table(compared: dict[str, dict[str, Any]]) -> Table:
    """A row for each figure, a column for each run."""
    shown = Table(title="PPO and GRPO on the same task", box=None, header_style="dim")
    shown.add_column("")
    for name in compared:
        shown.add_column(name.upper(), justify="right")
    parts = list(compared.values())
    for step in parts[0]["heldout_accuracy"]:
        shares = [part["heldout_accuracy"].get(step, math.nan) for part in parts]
        shown.add_row(f"held-out accuracy after {step} steps", *[f"{100 * share:.1f} %" for share in shares])
    shown.add_row("accuracy of the last 5 rollouts", *[f"{100 * part['accuracy_last_steps']:.1f} %" for part in parts])
    shown.add_row("minutes", *[f"{part['seconds'] / 60:.1f}" for part in parts])
    for name in ("a_step", *PHASES):
        seconds = [f"{part[f'seconds_of_{name}']:.2f}" for part in parts]
        shown.add_row(f"seconds, median: {name.replace('_', ' ')}", *seconds)
    for name in ("policy", "critic"):
        row = [f"{part[f'{name}_bytes'] / 1e6:.1f} MB" for part in parts]
        shown.add_row(f"weights, gradients, optimizer of the {name}", *row)
    peaks = [part["trainer_peak_gib"] for part in parts]
    cells = ["?" if peak is None else f"{peak:.2f} GiB" for peak in peaks]
    shown.add_row("largest memory of the trainer's process", *cells)
    return shown


if __name__ == "__main__":
    sys.exit(main())
