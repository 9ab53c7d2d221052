"""The engines of one node of a fleet: started, announced, watched, started again; they end with this process.

    srun python -m megatron_r1.cluster.engines run.toml --gpus-per-node=8 --folder=DIR

`run.toml` is a resolved run file, the node's number and address are in the environment (`slurm/lib/task.sh`). What runs
here is what the run itself would start on its own node, but for the address: these engines listen where other nodes can
reach them, and answer those alone who show the token that the environment holds. When those of a node are ready,
`DIR/<node>.engines` says where each of them is; of an engine that spans nodes its first node says it.

A process that is killed takes its node's engines with it, and `slurm/lib/task.sh` starts another in its place, which
begins them anew.
"""

import argparse
import os
import signal
import sys
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.cluster.needs import engines, needs
from megatron_r1.cluster.parts import Follower, Head, Place
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.rollout.client import wait_until_healthy
from megatron_r1.rollout.member import START_KEY
from megatron_r1.rollout.server import SUPERVISOR_MODULE
from megatron_r1.rollout.token_gate import TOKEN_VARIABLE
from megatron_r1.wording import counted

POLL_SECONDS = 1.0
ENDING_SECONDS = 60.0
"""For engines whose process here was killed to be gone: their own supervisors see to it."""


def serve(run: dict[str, Any], node: int, gpus_per_node: int, address: str, folder: Path) -> None:
    """Have the engines of a node run until this process is told to end.

    Raises:
        ConfigError: no token, or no such node.
        EngineError: an engine does not start, or has failed too often.
    """
    if not (token := os.environ.get(TOKEN_VARIABLE, "")):
        raise ConfigError(f"the environment variable {TOKEN_VARIABLE} holds no token")
    announcement = _announcement(folder, node)
    replaces = after_another(folder, node)
    fleet = needs(run, gpus_per_node).fleet
    if node >= len(fleet):
        raise ConfigError(f"node {node}: the run file asks for {counted(len(fleet), 'node')} of engines")
    numbers = {(engine.key, engine.index): number for number, engine in enumerate(engines(run))}
    free = iter(range(max(gpus_per_node, 0)))
    running: list[Head | Follower] = []
    with ExitStack() as stack:
        for part in fleet[node]:
            devices = [next(free) for _ in range(part.gpus)] if gpus_per_node else None
            place = Place(numbers[part.engine.key, part.engine.index], devices, address, folder, token)
            of_head = _announcement(folder, node - part.rank)
            one = Follower(part, place, of_head, replaces) if part.rank else Head(part, place)
            stack.callback(one.close)
            running.append(one)
        heads = [one for one in running if isinstance(one, Head)]
        if not announcement.exists():  # those of one that was replaced are known, and looked after at once
            if heads:
                _wait(heads)
            announce(heads, announcement)
        while True:
            for one in running:
                one.look()
            time.sleep(POLL_SECONDS)


def after_another(folder: Path, node: int) -> bool:
    """Whether a process like this one was on the node before; waits until what it has run is gone."""
    file = folder / f"{node}.pid"
    before = file.read_text() if file.exists() else ""
    deadline = time.monotonic() + ENDING_SECONDS
    while before and _guarded(before) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    file.write_text(str(os.getpid()))
    return bool(before)


def _guarded(starter: str) -> bool:
    """Are there engines left that a process has started? Their supervisors have its number on their command line."""
    lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return any(line[1:4] == ["-m", SUPERVISOR_MODULE, starter] for line in lines)


def announce(heads: list[Head], file: Path) -> None:
    """Say where the engines of a node are: a line for each with key, number and address. A node may have none."""
    lines = [f"{one.part.engine.key}\t{one.part.engine.index}\t{one.url}\n" for one in heads]
    aside = file.with_name(f".{file.name}")
    aside.write_text("".join(lines))
    aside.rename(file)


def _announcement(folder: Path, node: int) -> Path:
    return folder / f"{node}.engines"


def _wait(heads: list[Head]) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(one.client()) for one in heads]
        wait_until_healthy(clients, max(one.part.engine.section.start_timeout for one in heads), START_KEY)


def main() -> int:
    """Run until SIGTERM or SIGUSR1."""
    parser = argparse.ArgumentParser(description="The engines of one node of a fleet.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGUSR1):  # srun hands on the second only
        signal.signal(signum, lambda *_: sys.exit(0))
    try:
        run = tomllib.loads(options.run.read_text(encoding="utf-8"))
        node, address = int(os.environ["SLURM_NODEID"]), os.environ["MEGATRON_R1_ADDRESS"]
        serve(run, node, options.gpus_per_node, address, options.folder)
    except UserError as error:
        print(f"megatron-r1 engines: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
