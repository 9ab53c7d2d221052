"""One line of what the doctor says."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["ok", "absent", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at."""

    part: str
    """The table it stands in."""
    name: str
    state: State
    """"absent" = not there, and of no use on a machine like this; "note" = some runs need it, or are slower for it;
    "bad" = nothing should be started before it is mended."""
    found: str
    fix: str = ""
    """What to type or to do; empty where nothing has to be done."""
    serves: frozenset[str] = frozenset()
    """What a run file may ask for that does not work without it (`demand.py`)."""


def required(findings: Iterable[Finding], demanded: Iterable[str]) -> list[Finding]:
    """What is not there, or does not work, is bad where it is asked for."""
    demanded = set(demanded)
    return [
        replace(finding, state="bad") if finding.state != "ok" and finding.serves & demanded else finding
        for finding in findings
    ]
