"""Runs jobs under parallel layouts: `python -m tests.distributed.program FOLDER`, one job a line of standard input.

Megatron is imported once; the ranks of each job are forked from this process and meet over gloo. A job is

    {"folder": ..., "parallel": {the run file's [parallel]}, "parts": [{"name": ..., "kind": ..., ...}, ...]}

and every rank does its parts, one after another (`tests/distributed/kinds.py`). The first rank writes what it saw into
`<folder>/<name>`. The answer to a job is one line of JSON: the error, or null.
"""

import faulthandler
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.load import validate
from megatron_r1.config.sections import ParallelSection
from tests.distributed import kinds, models

DEADLINE = 500
"""Seconds for all parts of a job, on machines that are busy with others; a rank then writes where it stands."""


def work(rank: int, world: int, job: dict[str, Any]) -> None:
    """One rank. What it prints goes to a file of its own; an error ends it at once, because others wait for it."""
    folder = Path(job["folder"])
    with (folder / f"rank_{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.dump_traceback_later(DEADLINE)
        try:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo", f"file://{folder}/meeting", timedelta(seconds=DEADLINE), rank=rank, world_size=world
            )
            for part in job["parts"]:
                kinds.run(folder / part["name"], validate(ParallelSection, job["parallel"], where="job"), part)
            dist.barrier()
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None
        os._exit(0)


def run(job: dict[str, Any]) -> str | None:
    """All ranks of a job; what went wrong."""
    folder, section = Path(job["folder"]), validate(ParallelSection, job["parallel"], where="job")
    world, context = section.processes or section.fewest, multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, world, job), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    error = _wait(ranks)
    for process in ranks:
        process.kill()
        process.join()
    if error is None:
        return None
    return "\n".join([error, *(f"{log.name}:\n{log.read_text()[-6000:]}" for log in sorted(folder.glob("*.log")))])


def _wait(ranks: list[ForkProcess]) -> str | None:
    left = {process.sentinel: number for number, process in enumerate(ranks)}
    while left:
        ended = multiprocessing.connection.wait(list(left), DEADLINE + 10)
        if not ended:
            return f"ranks {sorted(left.values())} did not end within {DEADLINE} s"
        for number in [left.pop(sentinel) for sentinel in ended]:
            ranks[number].join()
            if ranks[number].exitcode != 0:
                return f"rank {number} ended with {ranks[number].exitcode}"
    return None


def main() -> None:
    """Write the model folders, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's to handle; the end of its input ends this program
    # In a process of its own: it leaves a process group behind, which a forked rank could not take down.
    writer = multiprocessing.get_context("fork").Process(target=models.write_all, args=(Path(sys.argv[1]),))
    writer.start()
    writer.join()
    # Else every rank's garbage collector goes through all that was imported, and copies it by touching it.
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps(writer.exitcode or None), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
