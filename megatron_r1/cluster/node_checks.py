"""What a node can tell about itself: its GPUs, its memory and disks, and what a site's own check says."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

COMMAND_SECONDS = 120
DISK_GIB = 20.0
"""Free where runs are written, at least; half of it for temporary files."""
SHARED_MEMORY_GIB = 1.0
USED_MIB = 2048
"""Memory of a GPU that may be in use before a run begins."""
GPU_FIELDS = {
    "index": "",
    "memory.used": "",
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "remapped_rows.pending": "rows of memory wait to be remapped: it has to be reset",
    "remapped_rows.failure": "rows of memory could not be remapped",
    "clocks_event_reasons.hw_slowdown": "slowed down by its hardware",
    "clocks_event_reasons.hw_thermal_slowdown": "slowed down because it is too hot",
}
"""What nvidia-smi is asked, and what is wrong with a GPU where the answer is yes or above 0."""


@dataclass
class Findings:
    """What is wrong with a node, and what else there is to say."""

    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """`well` or `bad`, then a line for each; another rank's file is added to."""
        before = file.read_text().splitlines()[1:] if file.exists() else []
        lines = [*before, *(f"bad: {line}" for line in self.bad), *(f"note: {line}" for line in self.notes)]
        verdict = "bad" if any(line.startswith("bad: ") for line in lines) else "well"
        aside = file.with_name(f".{file.name}-{os.getpid()}")
        aside.write_text("\n".join([verdict, *lines, ""]))
        aside.rename(file)


def look(gpus: int, path: Path, command: str) -> Findings:
    """All of it.

    Args:
        gpus: how many there have to be.
        path: where the run is written.
        command: a check of the site's own, for a shell; empty = none.
    """
    findings = Findings()
    for folder, least in ((path, DISK_GIB), (Path(tempfile.gettempdir()), DISK_GIB / 2)):
        findings.bad += disk(folder, least)
    findings.bad += disk(Path("/dev/shm"), SHARED_MEMORY_GIB)
    if gpus:
        query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        code, said = _run(query)
        findings.bad += graphics(said, gpus) if code == 0 else [f"nvidia-smi: {_last(said) or f'exit code {code}'}"]
    if command:
        code, said = _run(["bash", "-c", command])
        findings.bad += [] if code == 0 else [f"{command!r}: {_last(said) or f'exit code {code}'}"]
    return findings


def disk(folder: Path, least: float) -> list[str]:
    """Can it be written to, and has it room? `least`: GiB."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return [f"{folder} cannot be written to: {error.strerror}"]
    return [f"{folder} has {free:.1f} GiB free, less than {least:g}"] if free < least else []


def graphics(said: str, gpus: int) -> list[str]:
    """What is wrong with GPUs, from nvidia-smi's lines; a field that a GPU does not know is passed over."""
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    found = [] if len(rows) == gpus else [f"{len(rows)} GPUs, not {gpus}"]
    for row in rows:
        index, used, *answers = row
        if used.isdecimal() and int(used) > USED_MIB:
            found.append(f"GPU {index}: {used} MiB are in use")
        for answer, wrong in zip(answers, list(GPU_FIELDS.values())[2:], strict=True):
            if answer in {"Active", "Yes"} or (answer.isdecimal() and int(answer) > 0):
                found.append(f"GPU {index}: {wrong} ({answer})")
    return found


def _run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _last(said: str) -> str:
    return said.strip().splitlines()[-1] if said.strip() else ""
