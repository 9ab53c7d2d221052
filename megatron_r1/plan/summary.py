"""Plans of many runs for people: a line each, then the arithmetic of each."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.plan.fleet import FleetPlan
from megatron_r1.plan.plan import GIB, Plan
from megatron_r1.plan.serving import ServedPlan
from megatron_r1.plan.table import MARKS, WIDTH, times
from megatron_r1.wording import counted

Row = tuple[str, str, Plan | ServedPlan | None, str]
"""Name, verb, its plan, and why there is none."""
_COLUMNS = (
    "run",
    "verb",
    "model",
    "GPUs",
    "fits",
    "GiB",
    "time of a step",
    "steps",
    "GPU-hours",
    "weights",
    "checkpoint",
)


def print_table(rows: Sequence[Row]) -> None:
    """All of them on standard output."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    hardware = next((made.hardware.name for _, _, made, _ in rows if isinstance(made, Plan)), "")
    title = f"planned on {hardware}" if hardware else "planned"
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for column in _COLUMNS:
        left = column in {"run", "verb", "model", "fits"}
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for name, verb, made, why in rows:
        cells = _trained(made) if isinstance(made, Plan) else _served(made) if made else ["", "", "-" if why else ""]
        table.add_row(escape(name), verb, *cells)
    console.print(table)
    console.print()
    for name, _, made, why in rows:
        if why and why != "no GPU":
            console.print(f"{name}: {why}", markup=False, highlight=False, soft_wrap=True)
        for line in arithmetic(made) if made else ():
            console.print(f"{name}: {line}", markup=False, highlight=False, soft_wrap=True)
        for finding in made.findings if made else ():
            text = f"{escape(name)}: [{MARKS[finding.kind]}]{finding.kind}[/]: {escape(finding.text)}"
            console.print(text, highlight=False, soft_wrap=True)


def _trained(made: Plan) -> list[str]:
    fits = all(finding.kind == "unwise" for finding in made.findings)
    fullest = max((peak for rank in made.memory for peak in rank.peaks.values()), default=0.0)
    engines = f" + {made.all_gpus - made.gpus:,}" if made.fleet else ""
    return [
        f"{_family(made.hf['architectures'][0])} {made.counts.main / 1e9:,.1f} B",
        f"{made.gpus:,}{engines}",
        "yes" if fits else "[red]no[/]",
        f"{fullest / GIB:.1f}",
        _span(made.step_seconds),
        f"{made.load.steps:,.0f}" if made.load.steps else "",
        f"{made.gpu_hours:,.0f}" if made.gpu_hours else "",
        f"{made.fleet.sync.bytes / 1e12:.2f} TB, {_span(made.fleet.sync.seconds)}" if made.fleet else "",
        f"{made.saved.bytes / 1e12:.2f} TB, {_span(made.saved.seconds)}" if made.saved else "",
    ]


def _served(made: ServedPlan) -> list[str]:
    return [
        ", ".join(made.models) if len(made.models) > 1 else _family(next(iter(made.models.values()))),
        f"{made.all_gpus:,}",
        "[red]no[/]" if made.findings else "yes",
        f"{max(one.weights for one in made.fleets.values()) / GIB:.1f}",
        _span(made.seconds),
        "all of it" if made.seconds else "",
        f"{made.gpu_hours:,.0f}" if made.gpu_hours else "",
    ]


def arithmetic(made: Plan | ServedPlan) -> Iterator[str]:
    """Where the fullest rank's memory and a step's seconds go."""
    if isinstance(made, ServedPlan):
        for name, fleet in made.fleets.items():
            yield f"{name}: {_engines(fleet)}"
        return
    if made.memory:
        yield _memory(made)
    if made.step_seconds:
        parts = sorted(times(made).items(), key=lambda item: -item[1])
        yield f"a step of {_span(made.step_seconds)} = " + " + ".join(f"{name} {_span(value)}" for name, value in parts)
    if made.fleet:
        yield _engines(made.fleet)
    if made.host:
        sizes = " + ".join(f"{name} {size / GIB:,.0f}" for name, size in made.host.items())
        yield f"the first node's host holds {sizes} of {made.hardware.host_memory / GIB:,.0f} GiB"


def _memory(made: Plan) -> str:
    rank = max(made.memory, key=lambda one: max(one.peaks.values()))
    phase, peak = max(rank.peaks.items(), key=lambda item: item[1])
    sizes = " + ".join(f"{name} {size / GIB:.1f}" for name, size in rank.parts.items() if size > 0.05 * GIB)
    at_train = f"at train {rank.peaks['train'] / GIB:.1f} = {sizes}, {made.hardware.lost:.0%} lost to fragmentation"
    most = "" if phase == "train" else f"{peak / GIB:.1f} GiB at {phase}, "
    return f"stage {rank.stage}, of {made.hardware.memory / GIB:.1f} GiB: {most}{at_train}"


def _engines(fleet: FleetPlan) -> str:
    rate = f", {fleet.tokens_per_second:,.0f} tokens/s together" if fleet.tokens_per_second else ""
    wait = 0 < fleet.tail_seconds < fleet.rollout_seconds
    tail = (
        f"; all have begun {_span(fleet.tail_seconds)} before the end of {_span(fleet.rollout_seconds)}" if wait else ""
    )
    return (
        f"{counted(fleet.engines, 'engine')} of {counted(fleet.gpus // fleet.engines, 'GPU')}: "
        f"{fleet.weights / GIB:.1f} GiB of weights on each, caches of {fleet.cache_tokens:,} tokens, "
        f"{counted(fleet.at_once, 'sample')} at once{rate}{tail}"
    )


def _family(architecture: str) -> str:
    return architecture.removesuffix("ForCausalLM").replace("ForSequenceClassification", " scalar")


def _span(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
