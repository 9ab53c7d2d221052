"""The same fine-tuning from several model folders, in two data-parallel processes.

``python -m tests.train.megatron_folder_program RUNS.json``, a list of what `SFTConfig` takes.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

from megatron_r1.config.load import validate
from megatron_r1.config.sft import SFTConfig
from megatron_r1.train.sft import run

RANKS = 2


def work(rank: int, port: int, trees: list[dict[str, Any]]) -> None:
    """One process."""
    world = {"RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    for tree in trees:
        run(validate(SFTConfig, tree, where="test"))


def main() -> None:
    """Forked, so that Megatron is imported once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    trees = json.loads(Path(sys.argv[1]).read_text())
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, port, trees)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            raise SystemExit(f"a process ended with {process.exitcode}")


if __name__ == "__main__":
    main()
