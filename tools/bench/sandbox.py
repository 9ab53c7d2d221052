"""Programs in boxes against the same programs by `subprocess.run`, with nothing that holds them."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from paired import Comparison, measure, report

from megatron_r1.config.sandbox import Limits
from megatron_r1.reward.sandbox.job import Program
from megatron_r1.reward.sandbox.local import Local, open_pool

SOURCE = "print(sum(map(int, input().split())))"
INPUTS = 20
LIMITS = Limits(wall_seconds=60)

Work = Callable[[int], None]
"""One program, with numbers of its own."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sandbox", choices=("bubblewrap", "rlimits"), default="bubblewrap")
    parser.add_argument("--programs", type=int, default=100, help="a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="pairs that are measured (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    cores = len(os.sched_getaffinity(0))
    local = Local(open_pool(chosen.sandbox))

    def boxed(inputs: int) -> Work:
        def work(index: int) -> None:
            texts = [f"{index} {other}\n" for other in range(inputs)]
            runs = local.run(Program("python", SOURCE), texts, LIMITS)
            expect([run.stdout for run in runs], index)

        return work

    def plain(inputs: int, *options: str) -> Work:
        def work(index: int) -> None:
            command = [sys.executable, *options, "-c", SOURCE]
            texts = (f"{index} {other}\n" for other in range(inputs))
            runs = [subprocess.run(command, input=text, capture_output=True, text=True, check=True) for text in texts]
            expect([run.stdout for run in runs], index)

        return work

    def rate(work: Work, inputs: int) -> Callable[[], float]:
        """Runs/s of as many threads as there are cores."""
        programs = max(1, chosen.programs // inputs)

        def figure() -> float:
            started = time.perf_counter()
            with ThreadPoolExecutor(cores) as threads:
                list(threads.map(work, range(programs)))
            return programs * inputs / (time.perf_counter() - started)

        return figure

    one, many = rate(boxed(1), 1), rate(boxed(INPUTS), INPUTS)
    comparisons = [
        Comparison("programs of one input", "runs/s", "python3 -c", one, rate(plain(1), 1)),
        Comparison("programs of one input", "runs/s", "python3 -I -S -c", one, rate(plain(1, "-I", "-S"), 1)),
        Comparison(f"programs of {INPUTS} inputs", "runs/s", "python3 -c", many, rate(plain(INPUTS), INPUTS), 1.0),
    ]
    try:
        measure(comparisons, chosen.rounds)
    finally:
        local.close()
    report("sandbox", comparisons, chosen.json, sandbox=chosen.sandbox, programs=chosen.programs, threads=cores)


def expect(outputs: list[str], index: int) -> None:
    assert outputs == [f"{index + other}\n" for other in range(len(outputs))]


if __name__ == "__main__":
    main()
