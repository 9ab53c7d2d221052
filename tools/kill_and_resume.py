"""A pretraining run twice, once with `kill -9` in its middle, compared bit for bit and drawn:

    python tools/kill_and_resume.py examples/python_library/pretrain.toml runs/python_library --image=curve.svg

`OUTPUT/undisturbed` is the run as it is. `OUTPUT/killed` is the same run, one of whose processes gets SIGKILL half-way
between two checkpoints, followed by the same command again. Further arguments override keys of the run file. Killed
itself, this program goes on where it was. It leaves `OUTPUT/summary.json`, and prints it as Markdown.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from matplotlib.figure import Figure
from matplotlib.pyplot import rc_context

from megatron_r1.config.load import load
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.data.files import write_json
from megatron_r1.errors import UserError
from megatron_r1.report.journal import Row, read

UNDISTURBED, KILLED = "undisturbed", "killed"
TIMES = ("elapsed", "seconds", "tokens_per_second", "tflops", "mfu", "memory_peak_max", "learner_idle")
TIMED = ("seconds/", "sync_seconds/", "fleet_")
"""What tells time or place in a row of metrics.jsonl, and so differs."""
AVERAGED = 50
"""Steps whose mean loss stands in the table."""


def main() -> int:
    """Both runs, the comparison and the figure. Returns 0 if both end with the same bits."""
    parser = argparse.ArgumentParser(description="A pretraining run twice, once with kill -9 in its middle.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("output", type=Path, help="folder of both runs")
    parser.add_argument("--at", type=int, help="step to kill at; default: half-way between two checkpoints")
    parser.add_argument("--rank", type=int, default=1, help="the process to kill; default: 1")
    parser.add_argument("--image", type=Path, help="SVG file for the loss of both")
    arguments, overrides = parser.parse_known_args()
    try:
        config = load(arguments.run_file, overrides, PretrainConfig)
        at = arguments.at or middle(config)
        run_both(arguments.run_file, overrides, arguments.output, (at, arguments.rank))
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = compared(arguments.output)
    write_json(arguments.output / "summary.json", found)
    if arguments.image:
        draw(arguments.output, found, arguments.image)
    print(table(found))
    return 0 if found["same_weights"] and found["same_checkpoint"] and found["same_metrics"] else 1


def middle(config: PretrainConfig) -> int:
    """The step in the run's middle whose kill loses most: half-way between two checkpoints.

    Raises:
        RuntimeError: the run's length is given in tokens.
    """
    if config.steps is None:
        raise RuntimeError("the run's length is given in tokens: say with --at at which step to kill")
    every = config.checkpoint.every
    return config.steps // 2 // every * every + every // 2


def run_both(run_file: Path, overrides: list[str], output: Path, kill: tuple[int, int]) -> None:
    """What is left to do of both runs; `kill` is the step and the rank.

    Raises:
        RuntimeError: a run has failed, or has ended before it could be killed.
    """
    note = output / "kill.json"
    for name in (UNDISTURBED, KILLED):
        folder = output / name
        if name == KILLED and not note.exists():
            process = started(run_file, overrides, folder)
            done = killed(process, folder, *kill)
            output.joinpath("before_kill.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
            write_json(note, done)
        if not (folder / "summary.json").exists() and started(run_file, overrides, folder).wait():
            raise RuntimeError(f"the run has failed: {folder.with_suffix('.log')} says why")


def started(run_file: Path, overrides: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """`megatron-r1 pretrain` in the background; what it says is appended to `<folder>.log`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_r1.cli", "pretrain", str(run_file), *overrides, f"--output={folder}"]
    print(" ".join(["megatron-r1", *command[3:]]), flush=True)
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def killed(process: subprocess.Popen[bytes], folder: Path, at: int, rank: int) -> dict[str, Any]:
    """Wait for step `at`, end one rank by SIGKILL, and wait for the end of the command.

    Raises:
        RuntimeError: the command has ended before.
    """
    while last_step(folder / "metrics.jsonl") < at:
        if process.poll() is not None:
            raise RuntimeError(f"the run has ended before step {at}: see {folder.with_suffix('.log')}")
        time.sleep(0.2)
    pid = json.loads((folder / f"heartbeats/rank_{rank}.json").read_text())["pid"]
    victim = next(child for child in psutil.Process(process.pid).children(recursive=True) if child.pid == pid)
    victim.send_signal(signal.SIGKILL)
    code = process.wait()
    said = [line for line in folder.with_suffix(".log").read_text().splitlines() if "was ended by" in line]
    kept = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")]
    return {"rank": rank, "exit_code": code, "said": said, "went_on_from": max(kept, default=0)}


def last_step(journal: Path) -> int:
    """Step of the newest row, -1 without one."""
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else -1


def compared(output: Path) -> dict[str, Any]:
    """Figures of both runs, and whether they are the same."""
    kill = json.loads((output / "kill.json").read_text())
    calm, hit = (read(output / name / "metrics.jsonl") for name in (UNDISTURBED, KILLED))
    before = steps(read(output / "before_kill.jsonl"))
    first = json.loads((output / UNDISTURBED / "summary.json").read_text())
    kept = [row["elapsed"] for row in before if row["step"] < kill["went_on_from"]]
    lost = before[-1]["elapsed"] - max(kept, default=0.0)
    return {
        "parameters": first["parameters"],
        "tokens": first["tokens"],
        "kill": {**kill, "steps_done": len(before)},
        UNDISTURBED: figures(output / UNDISTURBED, calm, 0),
        KILLED: figures(output / KILLED, hit, lost),
        "same_weights": same(output, "hf/*.safetensors"),
        "same_checkpoint": same(output, f"checkpoints/step_{len(steps(calm)):08d}/*.distcp"),
        "same_metrics": all(timeless(a) == timeless(b) for a, b in zip_longest(judged(calm), judged(hit))),
        "same_before_kill": all(timeless(a) == timeless(b) for a, b in zip(before, steps(calm), strict=False)),
    }


def figures(folder: Path, rows: list[Row], lost: float) -> dict[str, Any]:
    """What stands in the table; `lost`: seconds of work that was done and lost."""
    losses = [row["loss"] for row in steps(rows)]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "first_loss": losses[0],
        "last_loss": fmean(losses[-AVERAGED:]),
        "validation": {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row},
        "minutes": (summary["seconds_total"] + lost) / 60,
        "sha256": hashlib.sha256((folder / "hf/model.safetensors").read_bytes()).hexdigest(),
    }


def same(output: Path, pattern: str) -> bool:
    """Whether both runs have the same files of a pattern, byte for byte."""
    one, other = (sorted((output / name).glob(pattern)) for name in (UNDISTURBED, KILLED))
    names = [path.name for path in one]
    return bool(one) and names == [path.name for path in other] and all(map(_equal, one, other))


def steps(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "step"]


def judged(rows: list[Row]) -> list[Row]:
    """Rows of steps and of evaluations."""
    return [row for row in rows if row["kind"] != "phase"]


def timeless(row: Row | None) -> Row | None:
    """A row without what tells time."""
    return row and {key: value for key, value in row.items() if key not in TIMES and not key.startswith(TIMED)}


def table(found: dict[str, Any]) -> str:
    """Figures of both runs side by side, as Markdown."""
    calm, hit = found[UNDISTURBED], found[KILLED]
    shown: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("loss of the first step", lambda run: f"{run['first_loss']:.4f}"),
        (f"mean loss of the last {AVERAGED}", lambda run: f"{run['last_loss']:.4f}"),
        *(
            (f"validation loss after {step} steps", lambda run, step=step: f"{run['validation'][step]:.4f}")
            for step in calm["validation"]
        ),
        ("minutes", lambda run: f"{run['minutes']:.1f}"),
        ("SHA-256 of the weights", lambda run: f"`{run['sha256'][:16]}…`"),
    ]
    rows = [f"| {name} | {show(calm)} | {show(hit)} |" for name, show in shown]
    kill, yes = found["kill"], {True: "the same", False: "**not the same**"}
    head = (
        f"{found['parameters']:,} parameters, {found['tokens']:,} tokens. Rank {kill['rank']} was killed after "
        f"{kill['steps_done']} steps; the run went on from the checkpoint after {kill['went_on_from']}."
    )
    verdict = (
        f"Weights: {yes[found['same_weights']]}. Last checkpoint, with the optimizer's moments: "
        f"{yes[found['same_checkpoint']]}. Metrics of every step: {yes[found['same_metrics']]}."
    )
    return "\n".join([head, "", "| | undisturbed | killed |", "|---|---:|---:|", *rows, "", verdict])


def draw(output: Path, found: dict[str, Any], image: Path) -> None:
    """Loss over steps: of the whole run, and near the kill."""
    calm, hit = (read(output / name / "metrics.jsonl") for name in (UNDISTURBED, KILLED))
    before = steps(read(output / "before_kill.jsonl"))
    back, at = found["kill"]["went_on_from"], found["kill"]["steps_done"]
    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    whole, near = canvas.subplots(1, 2, width_ratios=[3, 2])
    for axes in (whole, near):
        axes.plot(*curve(steps(calm)), color="#9ecae1", linewidth=4, label="undisturbed")
        axes.plot(*curve(steps(hit)[back:]), color="#08306b", linewidth=1.2, label="the same command again")
        axes.plot(*curve(before), color="#ff7f0e", linewidth=1.2, linestyle=(0, (3, 3)), label="until kill -9")
        axes.axvline(at, color="#d62728", linewidth=1)
        axes.axvline(back, color="#08306b", linewidth=1, linestyle=":")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    whole.plot(*curve(calm, "validation_loss"), "k^", markersize=4, label="validation, undisturbed")
    whole.plot(*curve(hit, "validation_loss"), "k+", markersize=8, label="validation, killed")
    whole.set_ylabel("loss, nats a token")
    whole.legend(frameon=False)
    margin = max((at - back) // 2, 2)
    shown = [row["loss"] for row in steps(calm)[max(back - margin, 0) : at + margin]]
    near.set(xlim=(back - margin, at + margin), ylim=(min(shown) - 0.05, max(shown) + 0.05))
    near.set_title(f"killed after {at} steps, gone on from {back}", fontsize=9)
    image.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):  # the same bytes each time; text as text
        canvas.savefig(image, format="svg", metadata={"Date": None})


def curve(rows: list[Row], name: str = "loss") -> tuple[list[int], list[float]]:
    """Steps done, and one figure after each."""
    known = [row for row in rows if name in row]
    return [row["step"] + (row["kind"] == "step") for row in known], [row[name] for row in known]


def _equal(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
