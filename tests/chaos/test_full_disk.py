"""The disk of a real run becomes full: it says so, keeps what it has, and goes on to the same bits when there is room.

Which file it is that no longer fits, and read-only disks, are tried in tests/checkpoint/test_disk.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.guard import PretrainGuardSection
from megatron_r1.errors import DataError
from megatron_r1.train.heartbeat import Heartbeat
from tests.end_to_end import runs

DISK_FULL = 74
UNSHARE = ["unshare", "--map-root-user", "--mount"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", [[], ["--checkpoint.asynchronous=true"]], ids=["at_once", "in_the_background"])
def test_the_old_checkpoint_stays_and_the_run_goes_on(prepared: Path, tmp_path: Path, options: list[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", disk], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are off here, so that no small disk can be mounted")
    command = [*UNSHARE, sys.executable, "-m", "tests.chaos.full_disk_program", str(prepared), str(disk), *options]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    happened = json.loads(done.stdout)
    assert happened["code"] == DISK_FULL, happened["said"]
    assert "the checkpoint needs" in happened["said"]
    assert "Traceback" not in happened["said"]
    assert happened["kept"] == ["step_00000004"]
    assert happened["again"] == 0, happened["said_again"]
    assert happened["same_weights"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    heartbeat = Heartbeat(tmp_path / "run", PretrainGuardSection(), 0, 1, "megatron-r1 pretrain")
    with pytest.raises(DataError, match=r"cannot write to .*/run/heartbeats: Not a directory"), heartbeat:
        pass
