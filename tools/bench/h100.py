"""What one GPU does: training in BF16 and FP8, log-probabilities, weights into an engine, rollout; one table.

    python tools/bench/h100.py --output=h100.json            # one H100, under ten minutes
    python tools/bench/h100.py --tiny --output=tiny.json     # a CPU: proves the script, its figures say nothing

A slice of DeepSeek-V3 with layers of true size (`h100_slice.py`) is trained by `Policy`, by a loop of Megatron-core's
own pieces with its own Transformer Engine layers, and by transformers; each has the whole device while it is measured,
and they take turns (`paired.py`). The share is of the matrix products that this device did a moment before, not of a
data sheet's. `--parts` leaves something out, as vLLM where it is not installed.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h100_engines
import h100_peaks
import h100_slice
from h100_learners import FP8, Learner, Megatron, Ours, Stage, Transformers, batch
from paired import Comparison, machine, measure
from rich.console import Console
from rich.table import Table

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.flops import forward_flops, training_flops, whole_config
from megatron_r1.model.hf_folder import read_config
from megatron_r1.model.parallel import initialize

PARTS = ("learners", "engines")
STEPS = 10
"""Of a figure."""


def learners(folder: Path, tiny: bool, rounds: int, fp8: bool) -> Iterator[Comparison]:
    """Pairs of learners, each when it is measured."""
    vocabulary = read_config(folder)["vocab_size"]
    rows, length = shape(tiny)
    made = batch(vocabulary, rows, length)
    stage = Stage(1 if tiny else STEPS, rows * length)
    ours: Callable[..., Callable[[], float]] = partial(stage.speed, "ours", partial(Ours, folder, made))
    theirs = partial(stage.speed, "transformers", partial(Transformers, folder, made))
    found = [
        Comparison("training, BF16", "tokens/s", "Megatron-core", ours("step"), _bare(stage, folder, made)("step")),
        Comparison("training, BF16", "tokens/s", "transformers", ours("step"), theirs("step")),
        Comparison("log-probabilities, BF16", "tokens/s", "transformers", ours("score"), theirs("score")),
    ]
    if fp8:
        eight: Callable[[], Learner] = partial(Ours, folder, made, fp8=FP8)
        fast, bare = partial(stage.speed, "ours, FP8", eight), _bare(stage, folder, made, fp8=FP8)
        found += [
            Comparison("training, FP8", "tokens/s", "Megatron-core, FP8", fast("step"), bare("step")),
            Comparison("training, FP8", "tokens/s", "ours, BF16", fast("step"), ours("step")),
        ]
    for comparison in found:
        measure([comparison], rounds)  # pair by pair: a model is exchanged as rarely as may be
        yield comparison
    stage.clear()


def _bare(stage: Stage, folder: Path, made: list[Any], **changes: Any) -> Callable[[str], Callable[[], float]]:
    name = "Megatron-core" + ", FP8" * bool(changes)
    return partial(stage.speed, name, partial(Megatron, folder, made, **changes))


def shape(tiny: bool) -> tuple[int, int]:
    """Rows of a step, and tokens of a row."""
    return (h100_slice.TINY_ROWS, h100_slice.TINY_LENGTH) if tiny else (h100_slice.ROWS, h100_slice.LENGTH)


def measured(chosen: argparse.Namespace, folder: Path, peaks: h100_peaks.Peaks) -> Iterator[Comparison]:
    """Of the parts that were asked for."""
    if "learners" in chosen.parts:
        yield from learners(folder, chosen.tiny, chosen.rounds, fp8=not (chosen.tiny or chosen.no_fp8))
    if "engines" in chosen.parts:
        yield from h100_engines.comparisons(chosen.tiny, peaks, chosen.port, chosen.rounds)


def rates(comparison: Comparison, folder: Path, tiny: bool, peaks: h100_peaks.Peaks) -> dict[str, Any]:
    """A pair's result, with operations a second and their share of the device's peak where it is of a learner."""
    result = comparison.result()
    scores = comparison.name.startswith("log-probabilities")
    if not scores and not comparison.name.startswith("training"):
        return result
    hf, (_, length) = read_config(folder), shape(tiny)
    count = forward_flops if scores else training_flops
    each = count(whole_config(hf, h100_slice.section(folder)), hf["vocab_size"], [length]).total / length
    peak = peaks.fp8 if "FP8" in comparison.name else peaks.bf16
    tflops = result["ours"] * each / 1e12
    return result | {"tflops": tflops, "share": tflops / peak if peak else None}


def table(results: Sequence[dict[str, Any]], peaks: h100_peaks.Peaks) -> Table:
    """For people."""
    made = Table(title="one GPU", title_justify="left")
    made.add_column("what")
    for column in ("ours", "baseline", "unit", "ratio (middle half)", "TFLOP/s", "of the peak"):
        made.add_column(column, justify="right")
    for name, unit, value in (
        ("matrix product, BF16", "TFLOP/s", peaks.bf16),
        ("matrix product, FP8", "TFLOP/s", peaks.fp8),
        ("copy on the device, read and written", "GB/s", peaks.copy),
        ("copy to the host", "GB/s", peaks.to_host),
        ("copy to the device", "GB/s", peaks.to_device),
    ):
        made.add_row(name, "", "none" if value is None else f"{value:,.3g}", unit, "", "", "")
    for row in results:
        low, high = row["ratio_quartiles"]
        made.add_row(
            f"{row['name']}\nagainst {row['baseline_name']}",
            f"{row['ours']:,.4g}",
            f"{row['baseline']:,.4g}",
            row["unit"],
            f"[bold]{row['ratio']:.3g}[/] ({low:.3g} to {high:.3g})",
            f"{row['tflops']:.3g}" if "tflops" in row else "",
            f"{row['share']:.1%}" if row.get("share") else "",
        )
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file with every figure")
    parser.add_argument("--tiny", action="store_true", help="a miniature, for a machine without a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--no-fp8", action="store_true", help="leave training in FP8 out")
    parser.add_argument("--rounds", type=int, default=2, help="pairs that are measured (default %(default)s)")
    parser.add_argument("--port", type=int, default=9000, help="of the engine")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    initialize(ParallelSection(), seed=0)
    peaks = h100_peaks.measure(chosen.tiny)
    with tempfile.TemporaryDirectory(prefix="megatron-r1-bench-") as name:
        folder = h100_slice.write(Path(name) / "slice", chosen.tiny)
        hf = read_config(folder)
        settings = {name: hf[name] for name in ("num_hidden_layers", "n_routed_experts", "hidden_size", "vocab_size")}
        settings |= {"tiny": chosen.tiny, "rows and tokens of a step": shape(chosen.tiny)}
        everything = {"benchmark": "one GPU", "settings": settings, "machine": machine(), "peaks": vars(peaks)}
        results: list[dict[str, Any]] = []
        for comparison in measured(chosen, folder, peaks):
            results.append(rates(comparison, folder, chosen.tiny, peaks))
            # Each time, so that what is there outlives what a limit of time cuts short.
            chosen.output.write_text(json.dumps(everything | {"results": results}, indent=2) + "\n")
    console = Console(width=140)
    console.print(table(results, peaks))
    for key, value in (settings | machine()).items():
        console.print(f"{key}: {value}", highlight=False)


if __name__ == "__main__":
    main()
