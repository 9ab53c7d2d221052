"""The doctor's findings for people, on standard output."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.doctor.examples import Verdict
from megatron_r1.doctor.finding import Finding

WIDTH = 160
"""Columns of what goes to a file."""
_COLOURS = {"ok": "green", "absent": "dim", "note": "yellow", "bad": "red"}


def show(findings: list[Finding], examples: list[Verdict], word: str) -> None:
    """All of it; `word` says what it comes to."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for part in dict.fromkeys(finding.part for finding in findings):
        console.print(_part(part, [finding for finding in findings if finding.part == part]))
        console.print()
    if examples:
        console.print(_examples(examples))
        console.print()
    console.print(word, highlight=False)


def _part(part: str, findings: list[Finding]) -> Table:
    table = Table(title=part, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        colour = _COLOURS[finding.state]
        table.add_row(f"[{colour}]{finding.state}[/]", escape(finding.name), escape(finding.found))
        if finding.fix and finding.state not in {"ok", "absent"}:
            table.add_row("", "", f"[dim]fix:[/] {escape(finding.fix)}")
    return table


def _examples(examples: list[Verdict]) -> Table:
    table = Table(title="examples on this machine", title_justify="left", box=None, show_header=False, pad_edge=False)
    for row in examples:
        table.add_row("[green]runs[/]" if row.runs else "[yellow]not[/]", escape(row.command), escape(row.why))
    return table
