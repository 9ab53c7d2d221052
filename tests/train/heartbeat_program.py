"""Three processes that sum a number at every step; one of them fails in the middle. Prints their exit codes.

``python -m tests.train.heartbeat_program OUTPUT FAULT PHASE``
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.config.guard import GuardSection
from megatron_r1.errors import UserError
from megatron_r1.train.heartbeat import FOLDER, Heartbeat, read

RANKS, FAULTY, FAULTY_STEP, STEPS = 3, 1, 3, 5
GUARD = GuardSection(deadline=2.0, deadlines={"rollout": 60.0})
LONG = 3.0
"""Seconds; above the deadline of all phases but `rollout`."""


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(1000)


def hold_the_interpreter() -> None:
    lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(256)
    lock(mutex)
    lock(mutex)  # as native code does that deadlocks and has not given the interpreter's lock back


def take_long() -> None:
    time.sleep(LONG)


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault for fault in (stop, die, sleep, hold_the_interpreter, take_long)
}


def work(rank: int, output: Path, fault: str, phase: str) -> None:
    """One process."""
    file = f"file://{output}/store"
    dist.init_process_group("gloo", file, rank=rank, world_size=RANKS, timeout=timedelta(days=1))
    try:
        with Heartbeat(output, GUARD, rank, RANKS, "megatron-r1 test") as heartbeat:
            for step in range(STEPS):
                heartbeat.beat(step, "data")
                time.sleep(0.3)
                heartbeat.beat(step, phase)
                if (rank, step) == (FAULTY, FAULTY_STEP):
                    while (said := read(output / FOLDER, RANKS)[rank]).step != step or said.phase != phase:
                        time.sleep(0.02)  # until its file has what the others will say of it
                    FAULTS[fault]()
                dist.all_reduce(torch.ones(1))
    except UserError as error:
        print(f"rank {rank} says: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Forked, so that torch is imported once."""
    output, fault, phase = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, output, fault, phase)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    print(json.dumps({"codes": [process.exitcode for process in ranks], "pids": [process.pid for process in ranks]}))


if __name__ == "__main__":
    main()
