"""A plan as a page: bars of every distinct rank's memory, of the step's time, and the assumptions."""

from pathlib import Path

from megatron_r1 import __version__
from megatron_r1.plan.plan import GIB, Plan
from megatron_r1.plan.table import headline, span, times
from megatron_r1.report.html import environment
from megatron_r1.report.journal import replace_text
from megatron_r1.wording import counted

COLOURS = 8
"""Of the pages' style."""


def write_page(made: Plan, path: Path, of: str) -> None:
    """Write that of a run file; the page loads nothing."""
    template = environment().from_string((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8"))
    names = list(made.memory[0].parts) if made.memory else []
    widest = max([made.hardware.memory, *(rank.peaks["train"] for rank in made.memory)])
    bars = [
        {
            "label": f"stage {rank.stage}",
            "note": f"layers {span(rank)}, {counted(rank.ranks, 'rank')} from {rank.rank}",
            "total": f"{max(rank.peaks.values()) / GIB:.1f} GiB",
            "over": max(rank.peaks.values()) > made.hardware.memory,
            "parts": [
                (number % COLOURS, 100 * rank.parts[name] / widest, f"{name}: {rank.parts[name] / GIB:.2f} GiB")
                for number, name in enumerate(names)
            ],
        }
        for rank in made.memory
    ]
    seconds = times(made) if made.update else {}
    total = sum(seconds.values()) or 1.0
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(
        path,
        template.render(
            title=f"Plan: {of}",
            lines=headline(made),
            findings=made.findings,
            names=[(number % COLOURS, name) for number, name in enumerate(names)],
            bars=bars,
            limit=100 * made.hardware.memory / widest,
            seconds=[
                (number % COLOURS, 100 * value / total, f"{name}: {value:.2f} s ({value / total:.0%})")
                for number, (name, value) in enumerate(seconds.items())
            ],
            search=[candidate.row() for candidate in made.found],
            sources=made.hardware.sources,
            version=__version__,
        ),
    )
