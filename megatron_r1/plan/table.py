"""A plan for people: tables on standard output."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.plan.memory import RankMemory
from megatron_r1.plan.plan import GIB, Plan
from megatron_r1.wording import counted

WIDTH = 200
"""Columns of what goes to a file."""
MARKS = {"illegal": "red", "does not fit": "red", "unwise": "yellow"}


def print_plan(made: Plan, proof: list[dict[str, Any]] | None) -> None:
    """All of a plan."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for line in headline(made):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if made.memory:
        console.print()
        console.print(_memory(made))
    if made.update:
        console.print()
        console.print(_time(made))
        for line in speed(made):
            console.print(line, highlight=False)
    if made.found:
        console.print()
        console.print(_search(made))
    console.print()
    for finding in made.findings:
        colour = MARKS[finding.kind]
        console.print(f"[{colour}]{finding.kind}[/]: {escape(finding.text)}", highlight=False, soft_wrap=True)
    if proof is not None:
        wrong = [row for row in proof if not row["equal"]]
        console.print(
            f"proof: {len(proof) - len(wrong)} of {len(proof)} distinct ranks have the planned bytes", highlight=False
        )
        for row in wrong:
            console.print(f"rank {row['rank']}: planned {row['planned']}, real {row['real']}", highlight=False)


def headline(made: Plan) -> list[str]:
    """What a plan says first."""
    counts, hours = made.counts, made.gpu_hours
    name = made.hf["architectures"][0]
    extra = f" and {counts.mtp / 1e9:.2f} B in MTP layers" if counts.mtp else ""
    lines = [
        f"{made.verb} of {name}, {counts.main:,} parameters{extra}, on {counted(made.gpus, 'GPU')}"
        + (f" and {made.fleet_gpus:,} of the fleet" if made.fleet else "")
        + f": {made.hardware.name}",
        f"{made.flops_per_token.total / 1e9:.2f} GFLOP a token",
    ]
    if made.step_seconds:
        lines.append(f"a step takes {made.step_seconds:.1f} s" + (f", the run {hours:,.0f} GPU-hours" if hours else ""))
        if hours and made.options.price:
            lines[-1] += f" = {hours * made.options.price:,.0f} at {made.options.price:g} each"
    if made.saved:
        lines.append(f"a checkpoint is {made.saved.bytes / 1e12:.2f} TB, {made.saved.seconds:.0f} s {made.saved.how}")
    if fleet := made.fleet:
        lines.append(
            f"an engine's cache holds {fleet.cache_tokens:,} tokens, {counted(fleet.at_once, 'sample')} at once; "
            f"new weights are {fleet.sync.bytes / 1e12:.2f} TB, {fleet.sync.seconds:.1f} s {fleet.sync.how}"
        )
    return lines


def _memory(made: Plan) -> Table:
    table = Table(title="GiB of a rank", title_justify="left", box=None, header_style="dim", pad_edge=False)
    names = [name for name in made.memory[0].parts if any(rank.parts[name] > 0 for rank in made.memory)]
    phases = list(made.memory[0].peaks)
    for column in ("stage", "first rank", "ranks", "layers", *names, *(f"at {phase}" for phase in phases)):
        table.add_column(column, justify="right", no_wrap=True)
    for rank in made.memory:
        sizes = [f"{rank.parts[name] / GIB:.1f}" for name in names]
        peaks = [_peak(rank.peaks.get(phase), made.hardware.memory) for phase in phases]
        table.add_row(str(rank.stage), str(rank.rank), str(rank.ranks), span(rank), *sizes, *peaks)
    return table


def _peak(size: float | None, limit: float) -> str:
    if size is None:
        return ""
    return f"[red]{size / GIB:.1f}[/]" if size > limit else f"{size / GIB:.1f}"


def span(rank: RankMemory) -> str:
    """Its layers in short."""
    count = len(rank.layers)
    return f"{count}" if not count else f"{rank.layers[0]}-{rank.layers[-1]} ({count})"


def _time(made: Plan) -> Table:
    table = Table(title="seconds", title_justify="left", box=None, header_style="dim", pad_edge=False)
    for column in ("part", "s", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = made.step_seconds or 1.0
    for name, value in times(made).items():
        table.add_row(name, f"{value:.2f}", f"{value / total:.0%}")
    return table


def speed(made: Plan) -> list[str]:
    """What training alone does."""
    if not made.update:
        return []
    own = made.update
    microbatches = counted(made.microbatches, "microbatch", "microbatches")
    rates = f"{own.tokens_per_gpu:,.0f} tokens and {own.flops_per_gpu / 1e12:.0f} TFLOP a second and GPU"
    return [f"training alone: {rates}; an update is {microbatches} of a rank, {own.seconds:.2f} s"]


def times(made: Plan) -> dict[str, float]:
    """Seconds of a step by part, none of them 0."""
    assert made.update
    parts = {name: value * made.load.updates for name, value in vars(made.update.parts).items()}
    parts["scoring"] = made.scoring
    if made.fleet:
        parts |= {"rollout": made.fleet.rollout_seconds, "weight sync": made.fleet.sync.seconds}
    return {name: value for name, value in parts.items() if value > 0}


def _search(made: Plan) -> Table:
    title = f"layouts of {counted(made.gpus, 'GPU')} that fit, the fastest first"
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for column in (
        "tensor",
        "pipeline",
        "virtual",
        "expert",
        "recompute",
        "update s",
        "tok/s/GPU",
        "TFLOP/s",
        "GiB",
        "layout",
    ):
        table.add_column(
            column, justify="left" if column in {"recompute", "layout"} else "right", no_wrap=column != "layout"
        )
    for one in made.found:
        own, memory = one.parallel, one.memory
        table.add_row(
            *(str(number) for number in (own.tensor, own.pipeline, own.virtual_pipeline, own.expert)),
            " ".join(memory.recompute_modules) or memory.recompute,
            f"{one.time.seconds:.2f}",
            f"{one.time.tokens_per_gpu:,.0f}",
            f"{one.time.flops_per_gpu / 1e12:.0f}",
            f"{one.peak / GIB:.1f}",
            own.pipeline_layout or "",
        )
    return table
