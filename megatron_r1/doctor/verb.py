"""`megatron-r1 doctor [run.toml] [--quick] [--json]`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_r1.doctor import demand as asked
from megatron_r1.doctor import gpus as graphics
from megatron_r1.doctor import machine as computer
from megatron_r1.doctor.examples import Verdict, of_file, verdicts
from megatron_r1.doctor.finding import Finding, required
from megatron_r1.doctor.versions import importable

_OWN = ("packaging", "rich")
"""What the doctor itself is made of."""


def run(run_file: Path | None, quick: bool, as_json: bool) -> int:
    """Look at everything and say it.

    Returns:
        0 = nothing is bad; with a run file: all that it asks for is here. Else 1.

    Raises:
        ConfigError: the run file cannot be read.
    """
    wanted = asked.read(run_file) if run_file else None
    machine, gpus = computer.look(Path.cwd()), graphics.look()
    findings = [
        *_packages(gpus),
        *computer.findings(machine, wanted.port if wanted else computer.PORT),
        *graphics.findings(gpus, quick),
    ]
    if run_file and wanted:
        findings = [
            *required(findings, wanted.serves),
            *of_file(run_file, machine, gpus),
            *asked.findings(run_file, wanted, machine, gpus),
        ]
    examples = [] if run_file else verdicts(machine, gpus, findings)
    bad = [finding for finding in findings if finding.state == "bad"]
    if as_json:
        print(json.dumps(_description(findings, examples)))
    else:
        _show(findings, examples, _word(run_file, bad))
    return 1 if bad else 0


def _packages(gpus: graphics.Gpus) -> list[Finding]:
    missing = [name for name in _OWN if not importable(name)]
    if missing:
        found = f"{', '.join(missing)} not installed, and so neither are others"
        return [Finding("packages", "packages", "bad", found, "make install")]
    from megatron_r1.doctor.packages import System, findings

    return findings(System(gpus.driver))


def _word(run_file: Path | None, bad: list[Finding]) -> str:
    what = str(run_file) if run_file else "megatron-r1"
    if not bad:
        return f"{what} can run here"
    return f"{what} cannot run here: {', '.join(finding.name for finding in bad)}"


def _show(findings: list[Finding], examples: list[Verdict], word: str) -> None:
    if importable("rich"):
        from megatron_r1.doctor.table import show

        show(findings, examples, word)
        return
    for finding in findings:
        fix = f"; fix: {finding.fix}" if finding.fix and finding.state not in {"ok", "absent"} else ""
        print(f"{finding.state:8}{finding.name}: {finding.found}{fix}")
    print(word)


def _description(findings: list[Finding], examples: list[Verdict]) -> dict[str, Any]:
    return {
        "passed": not any(finding.state == "bad" for finding in findings),
        "findings": [asdict(finding) | {"serves": sorted(finding.serves)} for finding in findings],
        "examples": [asdict(row) for row in examples],
    }
