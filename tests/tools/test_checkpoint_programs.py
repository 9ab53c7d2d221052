"""The programs of the checkpoint verbs are the same command line."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize(
    ("program", "verb"),
    [
        ("import_hf", "import"),
        ("export_hf", "export"),
        ("cast_hf", "cast"),
        ("inspect_checkpoint", "inspect"),
        ("verify_checkpoints", "verify"),
    ],
)
def test_help(program: str, verb: str) -> None:
    command = [sys.executable, str(TOOLS / f"{program}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: megatron-r1 {verb} ")
