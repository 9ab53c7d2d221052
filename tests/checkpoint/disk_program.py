"""Saves on a disk of its own that becomes full or read-only: `unshare -rm python -m tests.checkpoint.disk_program DIR`.

Prints what happened, one JSON object a line.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from tests.checkpoint.conftest import make, train

FEWEST, MOST = 9, 17
"""Files and folders that the disk may hold: one checkpoint, and two."""


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True)


def main() -> None:
    """Save once, and again under each condition; the last has room."""
    disk = Path(sys.argv[1])
    mount(disk, "size=64m")
    checkpoints = Checkpoints(disk / "checkpoints", CheckpointSection(keep=1), {"seed": 0})
    with tempfile.TemporaryDirectory() as model:
        policy = make(Path(model), num_hidden_layers=2)
    train(policy, 0, 1)
    checkpoints.save(1, policy.trainable, {}, {})
    used = sum(path.stat().st_size for path in checkpoints.folder.rglob("*") if path.is_file())
    full = [f"size=64m,nr_inodes={count}" for count in range(FEWEST, MOST + 1)]
    for condition in ["ro", f"rw,size={used + used // 2}", *full]:
        mount(disk, "remount", condition)
        try:
            checkpoints.save(2, policy.trainable, {}, {})
            outcome = "saved"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        names = sorted(path.name for path in checkpoints.folder.iterdir())
        print(json.dumps([condition, outcome, names, checkpoints.latest(), checkpoints.warnings]), flush=True)


if __name__ == "__main__":
    main()
