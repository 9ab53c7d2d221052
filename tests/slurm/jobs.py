"""Jobs as `slurm/submit.py` submits them, and what became of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.runs import ROOT
from tests.slurm.cluster import Slurm, wait

SECONDS = 900.0


class Job:
    """One job.

    Args:
        slurm: where it runs.
        number: its own, or that of its first part.
        folder: where it was submitted.
    """

    def __init__(self, slurm: Slurm, number: str, folder: Path) -> None:
        self.slurm, self.number, self.folder = slurm, number, folder

    def state(self) -> str:
        return self.slurm.job(self.number).get("JobState", "")

    def nodes(self, part: int = 0) -> list[str]:
        """Of a part of the job, as it runs now or has run last."""
        named = self.slurm.job(f"{self.number}+{part}" if part else self.number)["NodeList"]
        return self.slurm.call("scontrol", "show", "hostnames", named).split("\n")

    def said(self) -> str:
        """What its script has printed, in all attempts."""
        files = [*self.folder.glob(f"slurm-*-{self.number}.out")]
        return files[0].read_text() if files else ""

    def attempts(self) -> list[str]:
        """Exit codes of its attempts, but for those that Slurm itself has ended."""
        rows = [row.split("\t") for file in self.folder.rglob("slurm/attempts") for row in file.read_text().split("\n")]
        return [row[2] for row in rows if row[0] == self.number]

    def until(self, happened: Callable[[], bool], told: str = "") -> None:
        """Wait for something to happen while it runs or is queued."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", ""}
        wait(lambda: happened() or self.state() in over, SECONDS)
        assert happened(), f"{told}: job {self.number} is {self.state()}; {self.everything_said()}"

    def end(self) -> None:
        """Wait for it to be over, and well."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", ""}
        assert wait(lambda: self.state() in over, SECONDS), f"it is {self.state()}; {self.everything_said()}"
        assert self.state() == "COMPLETED", self.everything_said()

    def everything_said(self) -> str:
        logs = [file for file in self.folder.rglob("logs/slurm/**/*.log") if file.stat().st_size]
        return "\n".join([self.said(), *(f"{file}:\n{file.read_text(errors='replace')[-2000:]}" for file in logs)])


def submit(slurm: Slurm, folder: Path, *arguments: str, **environment: str) -> list[Job]:
    """What `submit.py` does with these arguments, on nodes without GPUs."""
    own = {"PYTHONPATH": str(ROOT), "MEGATRON_R1_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "slurm/submit.py", *arguments, "--gpus-per-node=0"],
        env=os.environ | slurm.environment | own | environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Job(slurm, number, folder) for number in done.stdout.split()]
