"""A full or read-only disk: the checkpoint before stays good, nothing half written stays, the reason is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.disk_program import FEWEST, MOST

ROOT = Path(__file__).parents[2]
PREPARED = ["unshare", "--map-root-user", "--mount"]
UNTOUCHED = "; the checkpoints before it are untouched"


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str], int, list[str]]]:
    """Condition of the disk -> how saving ended, the folder's names, the latest checkpoint, warnings."""
    disk = tmp_path_factory.mktemp("disk")
    if subprocess.run([*PREPARED, "mount", "-t", "tmpfs", "tmpfs", disk], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are off here, so that no small disk can be mounted")
    command = [*PREPARED, sys.executable, "-m", "tests.checkpoint.disk_program", str(disk)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {condition: rest for condition, *rest in rows}


def test_read_only(happened: dict[str, tuple[str, list[str], int, list[str]]]) -> None:
    said, names, latest, warnings = happened["ro"]
    assert said.startswith("DataError: cannot write ")
    assert said.endswith("step_00000002.partial: Read-only file system" + UNTOUCHED)
    assert (names, latest, warnings) == (["step_00000001"], 1, [])


def test_too_little_room_is_seen_before_anything_is_written(
    happened: dict[str, tuple[str, list[str], int, list[str]]],
) -> None:
    [(said, *rest)] = [row for condition, row in happened.items() if condition.startswith("rw,size=")]
    assert said.startswith("OSError: [Errno 28] cannot write ")
    assert "step_00000002.partial: No space left on device, the checkpoint needs 0.0" in said
    assert said.endswith(" GB are free" + UNTOUCHED)
    assert rest == [["step_00000001"], 1, []]


def test_full_at_whatever_file(happened: dict[str, tuple[str, list[str], int, list[str]]]) -> None:
    """As many files as fit: one more each time, until the checkpoint is whole."""
    rows = [happened[f"size=64m,nr_inodes={count}"] for count in range(FEWEST, MOST + 1)]
    refused = [row for row in rows if row[0] != "saved"]
    assert len(refused) == 7  # the folder and its six files
    for said, names, latest, warnings in refused:
        assert said.startswith("OSError: [Errno 28] cannot write ")
        assert "No space left on device, the checkpoint needs 0.0" in said
        assert said.endswith(UNTOUCHED)
        assert (names, latest, warnings) == (["step_00000001"], 1, [])
    for name in ("__0_", ".metadata", "metadata.json", "manifest.json"):  # the two data files are written side by side
        assert any(f"step_00000002.partial/{name}" in said for said, *_ in refused), name
    assert [row[1:] for row in rows if row[0] == "saved"] == [[["step_00000002"], 2, []]] * 2
