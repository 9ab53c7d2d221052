"""A run whose disk becomes full: `unshare -rm python -m tests.chaos.full_disk_program PREPARED DISK [OPTION ...]`.

The disk is mounted at DISK. When the first checkpoint stands it loses all its room but for lines of metrics; when the
run has ended it gets room again, and the same command is started. Prints what happened as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.end_to_end import runs
from tests.end_to_end.runs import Command, checkpoint, weights

PATIENCE = 600
SPARE_PAGES = 16
"""Of 4 KiB. A checkpoint takes some thousand KiB."""


def mount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)


def main() -> None:
    """Fill the disk once, then go on."""
    prepared, disk, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    mount(disk, "size=64m")
    output = disk / "run"
    run_file = runs.write(disk.with_suffix(".toml"), runs.pretrain(prepared, output))
    with Command("pretrain", run_file, *options) as command:
        command.until(checkpoint(output, 4), PATIENCE)
        used = int(subprocess.check_output(["du", "-sk", str(disk)], text=True).split()[0])
        mount(disk, f"remount,size={used + 4 * SPARE_PAGES}k")
        code = command.end(PATIENCE)
        found = {"code": code, "said": command.message(), "kept": names(output)}
    mount(disk, "remount,size=64m")
    with Command("pretrain", run_file, *options) as command:
        again = command.end(PATIENCE)
        found |= {"again": again, "said_again": command.message()}
    found["same_weights"] = weights(output) == weights(prepared / "base")
    print(json.dumps(found))


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


if __name__ == "__main__":
    main()
