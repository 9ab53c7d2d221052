"""What a data set was made of: counts by source and by domain, as figures and as a table (DeepSeek-R1 v2, table 5)."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.curate.candidates import Counts, Ledger


def figures(ledger: Ledger, names: Iterable[str]) -> dict[str, Any]:
    """`sources` by name, `domains`, and `total`, each with its counts."""
    by_source = {
        name: _sum(counts for (source, _), counts in ledger.counts.items() if source == name) for name in names
    }
    domains = dict.fromkeys(domain for _, domain in ledger.counts)
    by_domain = {name: _sum(part for (_, domain), part in ledger.counts.items() if domain == name) for name in domains}
    return {
        "sources": {name: counts.figures() for name, counts in by_source.items()},
        "domains": {name: counts.figures() for name, counts in by_domain.items()},
        "total": _sum(ledger.counts.values()).figures(),
    }


def explain(result: dict[str, Any]) -> str:
    """The counts of one line of the figures in words."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in result["dropped"].items())
    return f"{result['kept']:,} kept of {result['sampled']:,}, {result['correct']:,} of them right; " + (
        f"dropped: {dropped}" if dropped else "none dropped"
    )


def show(summary: dict[str, Any]) -> None:
    """Both tables on standard error."""
    console = Console(stderr=True)
    reasons = list(summary["total"]["dropped"])
    for heading in ("sources", "domains"):
        table = Table(box=None, header_style="dim")
        table.add_column(heading.removesuffix("s"))
        for column in ("sampled", "correct", *reasons, "kept", "rounds", "tokens"):
            table.add_column(column, justify="right", overflow="fold")
        lines = summary[heading] if len(summary[heading]) == 1 else summary[heading] | {"total": summary["total"]}
        for name, line in lines.items():
            table.add_row(name, *_cells(line, reasons))
        console.print(table)


def _cells(line: dict[str, Any], reasons: list[str]) -> list[str]:
    counts = [line["sampled"], line["correct"], *(line["dropped"].get(reason, 0) for reason in reasons), line["kept"]]
    means = ["–" if line[name] is None else f"{line[name]:,.1f}" for name in ("mean_rounds", "mean_tokens")]
    return [f"{count:,}" if count else "" for count in counts] + means


def _sum(parts: Iterable[Counts]) -> Counts:
    total = Counts()
    for part in parts:
        total.add(part)
    return total
