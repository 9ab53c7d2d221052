"""Two processes that sample together, from engines that have come back empty. Prints the phases that each has begun.

``python -m tests.train.collector_program FOLDER``
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch.distributed as dist

from megatron_r1.config.guard import GuardSection
from megatron_r1.config.sections import ReportSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.report.run import Report
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.server import WeightsNeededError
from megatron_r1.train.collector import Collector
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.interruption import Interruptions
from megatron_r1.types import Group, Question, Sample
from tests.train.test_collector_push import Exported, Failing, export
from tests.train.test_rl_rollouts import config

RANKS = 2
QUESTIONS = [Question("a", "task", "1 + 1", "2"), Question("b", "task", "1 + 2", "3")]


class Emptied:
    """Engines and judge; who asks has to push first, as often as `empty` says."""

    empty = 0
    updated = 0.0

    def stream(self, prompts: Sequence[list[int]], **_: Any) -> Iterator[tuple[int, list[Sample]]]:
        for index, _prompt in enumerate(prompts):
            if index and self.lacks():
                raise WeightsNeededError("engine-0 has come back without weights")
            yield index, [Sample([1], [0.0], "", True, 0)]

    def lacks(self) -> bool:
        self.empty -= 1
        return self.empty >= 0

    def submit(self, group: Group) -> None: ...

    def finish(self) -> None: ...


def sample(folder: Path, rank: int) -> int:
    """Phases that this rank has begun when all was sampled."""
    run = config(rollout={"max_model_len": 64, "max_tokens": 32})
    engines = Emptied()
    with Heartbeat(folder, GuardSection(), rank, RANKS, "megatron-r1 test") as heartbeat:
        report = Report(folder, ReportSection(), "test", 1, "", enabled=False, watch=heartbeat.beat)
        tokenizer = SimpleNamespace(encode_prompt=lambda prompt: [1])
        collector = Collector(run, cast(Tokenizer, tokenizer), report, Interruptions())
        collector._fleet, collector._sync = cast(Fleet, engines), Failing(0)
        collector._judge = cast(Any, SimpleNamespace(sitting=lambda: engines))
        collector.push(export(Exported()), version=0)
        engines.empty = 2
        assert [group.question for group in collector.collect(QUESTIONS, n=1, seed=0)] == QUESTIONS
        engines.empty = 2

        def produce() -> str:
            if engines.lacks():
                raise WeightsNeededError("no engine is left that has weights")
            return "produced"

        assert collector.at_first_rank(produce) == "produced"
        return heartbeat._now[0]


def work(rank: int, folder: Path, begun: "SimpleQueue[tuple[int, int]]") -> None:
    """One process."""
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    begun.put((rank, sample(folder, rank)))
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Forked, so that torch is imported once."""
    context = multiprocessing.get_context("fork")
    begun: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
    ranks = [context.Process(target=work, args=(rank, Path(sys.argv[1]), begun)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * RANKS
    print(json.dumps(dict(sorted(begun.get() for _ in ranks))))


if __name__ == "__main__":
    main()
