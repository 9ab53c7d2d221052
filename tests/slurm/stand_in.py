#!/usr/bin/env python3
"""What the scripts start in place of Python with megatron_r1: the same words, files and exit codes, and no model.

A run does a step each half second and keeps it as a checkpoint, but for as long as there is `<output>/hold`; a word in
`<output>/do` makes it fail. Engines announce themselves and wait; a word in `<output>/engine` makes that of the second
node fail before it has.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

OUTPUT = Path(os.environ.get("STAND_IN_OUTPUT", "."))
STEPS = 12
asked: list[int] = []


def note(signum: int, frame: FrameType | None) -> None:
    asked.append(signum)


def resolved() -> None:
    """The run file, or the shell's assignments of it."""
    values = {"OUTPUT": OUTPUT, "TRAINS": 1, "NODES": 1, "PROCESSES": 1, "FLEET_NODES": 2}
    print("\n".join(f"{name}={value}" for name, value in values.items()))


def engines() -> int:
    folder = Path(next(word for word in sys.argv if word.startswith("--folder=")).removeprefix("--folder="))
    node, address = os.environ["SLURM_NODEID"], os.environ["MEGATRON_R1_ADDRESS"]
    if node == "1" and (OUTPUT / "engine").exists():
        return int((OUTPUT / "engine").read_text())
    aside = folder / f".{node}.engines"
    aside.write_text(f"rollout.addresses\t{node}\thttp://{address}:{9600 + int(node)}-{os.getpid()}\n")
    aside.rename(folder / f"{node}.engines")
    while not asked:
        time.sleep(0.1)
    return 0


def run() -> int:
    record = {"arguments": sys.argv[3:], "token": os.environ.get("MEGATRON_R1_ENGINE_TOKEN", ""), "pid": os.getpid()}
    with (OUTPUT / "runs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    (OUTPUT / "checkpoints").mkdir(exist_ok=True)
    done = len([*(OUTPUT / "checkpoints").iterdir()])
    while done < STEPS:
        time.sleep(0.5)
        if (OUTPUT / "hold").exists() and not asked:
            continue
        if (OUTPUT / "do").exists():
            return int((OUTPUT / "do").read_text())
        done += 1
        (OUTPUT / f"checkpoints/step_{done:08d}").mkdir()
        if asked:
            return 75
    return 0


if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, note)
    if "megatron_r1.cluster.engines" in sys.argv:
        sys.exit(engines())
    if "--dry-run" in sys.argv or "megatron_r1.cluster.needs" in sys.argv:
        resolved()
        sys.exit()
    sys.exit(run())
