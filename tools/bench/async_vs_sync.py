"""Sampling ahead of training against taking turns: the same run with `max_staleness` 1 and 0, in time and accuracy.

    python tools/bench/async_vs_sync.py examples/r1_tiny/r1_zero.toml --seeds=3 --rollout.port=9000

Each seed is one pair of whole runs of `megatron-r1 rl`, whose order alternates (sync first, async first, ...), so that
other work on the machine is not in favour of one. What is finished is not run again, what was killed goes on; so a run
that was killed has the time of all its starts. Further options are overrides of the run file for both, except those
that start with `--async.` (`--async.rollout.max_staleness=2`). Ends with `runs/async_vs_sync/summary.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUTPUT = Path("runs/async_vs_sync")
AHEAD = ("--rollout.dispatch=continuous", "--rollout.max_staleness=1")
PHASES = ("rollout", "logprobs", "update", "sync")
ROWS = {
    "seconds of all steps": ("steps_seconds", "{:.0f}"),
    "seconds of the run, start and evaluations included": ("seconds", "{:.0f}"),
    **{f"seconds of a step in {phase}, mean": (phase, "{:.2f}") for phase in PHASES},
    "response tokens/s": ("tokens_per_second", "{:.0f}"),
    "learner waits for samples": ("waiting", "{:.1%}"),
    "held-out accuracy at first": ("accuracy_base", "{:.1%}"),
    "held-out accuracy at last": ("accuracy_final", "{:.1%}"),
    "accuracy of the last 5 rollouts": ("accuracy_last", "{:.1%}"),
    "staleness, mean": ("staleness", "{:.2f}"),
    "KL(engine || learner), mean": ("mismatch_kl", "{:.1e}"),
    "weights that a bound has changed": ("importance_changed", "{:.2%}"),
}


def main() -> int:
    """Run and compare. Returns the exit code of the first run that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="pairs of runs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options, overrides = parser.parse_known_args()
    for_async = [f"--{one.removeprefix('--async.')}" for one in overrides if one.startswith("--async.")]
    for_both = [one for one in overrides if not one.startswith("--async.")]
    pairs = []
    for seed in range(options.seeds):
        kinds = {"sync": for_both, "async": [*for_both, *AHEAD, *for_async]}
        for kind in sorted(kinds, reverse=seed % 2 == 0):
            if code := run(options.run_file, options.output / f"{kind}_{seed}", seed, kinds[kind]):
                return code
        pairs.append({kind: figures(options.output / f"{kind}_{seed}") for kind in kinds})
    result = {"run_file": str(options.run_file), "overrides": overrides, "ratio": ratio(pairs), "pairs": pairs}
    partial = options.output / "summary.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(options.output / "summary.json")
    Console().print(table(pairs))
    return 0


def run(run_file: Path, output: Path, seed: int, overrides: Sequence[str]) -> int:
    """`megatron-r1 rl` in a process of its own, unless it has finished before."""
    if (output / "summary.json").exists():
        return 0
    options = [f"--output={output}", f"--seed={seed}", *overrides]
    command = [sys.executable, "-m", "megatron_r1.cli", "rl", str(run_file), *options]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


def figures(output: Path) -> dict[str, float]:
    """What a finished run is compared by."""
    summary = json.loads((output / "summary.json").read_text())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    seconds = sum(row["seconds"] for row in steps)
    found = {
        "steps_seconds": seconds,
        "seconds": summary["seconds_total"],
        **{phase: statistics.fmean(row.get(f"seconds/{phase}", 0.0) for row in steps) for phase in PHASES},
        "tokens_per_second": sum(row["response_length"] for row in steps) * summary["samples"] / len(steps) / seconds,
        "waiting": sum(row.get("seconds/rollout", 0.0) + row.get("seconds/reward", 0.0) for row in steps) / seconds,
        "accuracy_base": summary["heldout_accuracy_base"],
        "accuracy_final": summary["heldout_accuracy_final"],
        "accuracy_last": statistics.fmean(row["accuracy"] for row in steps[-5:]),
    }
    for name in ("staleness", "mismatch_kl", "importance_changed", "fleet_idle"):
        if name in steps[0]:
            found[name] = statistics.fmean(row[name] for row in steps)
    return found


def ratio(pairs: Sequence[dict[str, dict[str, Any]]]) -> float:
    """Time of the steps of sync over that of async, median over pairs."""
    return statistics.median(pair["sync"]["steps_seconds"] / pair["async"]["steps_seconds"] for pair in pairs)


def table(pairs: Sequence[dict[str, dict[str, Any]]]) -> Table:
    """A row for each figure, means over seeds."""
    shown = Table(
        title=f"{len(pairs)} pairs of runs: async takes 1/{ratio(pairs):.2f} of the time", box=None, header_style="dim"
    )
    for column in ("", "sync", "async"):
        shown.add_column(column, justify="right" if column else "left")
    for label, (name, style) in ROWS.items():
        found = [[pair[kind][name] for pair in pairs if name in pair[kind]] for kind in ("sync", "async")]
        shown.add_row(label, *[style.format(statistics.fmean(values)) if values else "" for values in found])
    return shown


if __name__ == "__main__":
    sys.exit(main())
