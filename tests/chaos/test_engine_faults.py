"""Whatever becomes of an engine, the run goes on with it: every step once, every question once.

50 faults and more: `python -m tests.chaos.engine_faults --faults=50`.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.engine_faults import KILLED, STOPPED, draw
from tests.chaos.faulty_engine import ANSWERS
from tests.end_to_end import runs


@pytest.mark.timeout(1800)
def test_a_run_outlives_its_engine(prepared: Path) -> None:
    """A kill, and an answer that is wrong."""
    command = [sys.executable, "-m", "tests.chaos.engine_faults", "--faults=2", f"--prepared={prepared}"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["faults"] == 2 <= summary["engines_lost"]
    assert len(summary["by_kind"]) == 2


def test_every_fault_comes_before_any_comes_again() -> None:
    count = 3 * len(ANSWERS)
    faults = draw(count, random.Random(0))
    assert {fault.kind for fault in faults} == {*KILLED, *STOPPED, *ANSWERS}
    assert [fault.kind in kinds for fault, kinds in zip(faults[:3], (KILLED, ANSWERS, STOPPED), strict=True)] == [
        True
    ] * 3
    assert draw(count, random.Random(0)) == faults != draw(count, random.Random(1))
