"""Corrections of megatron-core's checkpoint writer, on every device."""

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME


def keep_results_in_process() -> None:
    """Write in threads of this process, and collect the results in a queue of this process.

    Upstream forks a process for each file (filesystem_async.py:245). It has all locks that threads of gloo, NCCL and
    OpenMP held at that moment, copies what the parent changes meanwhile, and writes on when the run has been killed.
    Its queue of results (:54) belongs to a `multiprocessing.Manager`, a process that lives on, too. Writing releases
    Python's lock, so threads do not wait for each other.

    0.19.2 has threads, but of an error it keeps the type alone, so that nobody is told that the disk is full
    (filesystem_async.py:330). Its `save` asks for another package, nvidia-resiliency-ext, whatever it is told
    (serialization.py leaves the default "nvrx"); it gets Megatron's own writer, which 0.16 has, too.
    """
    vars(filesystem_async)["_results_queue"] = queue.Queue()
    for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread"):  # 0.16's, 0.19's
        setattr(filesystem_async.FileSystemWriterAsync, name, staticmethod(_write_in_threads))
    if choose := getattr(torch_strategy, "get_async_strategy", None):
        vars(torch_strategy)["get_async_strategy"] = lambda strategy="mcore", module=None: choose("mcore", module)


class SaveStrategy(torch_strategy.TorchDistSaveShardedStrategy):
    """Writes what 0.16 writes by default, under 0.19, too: either goes on where the other has been.

    From 0.19 on one thread writes one file a rank, and what all ranks hold in common is an object among the tensors
    instead of `common.pt`, which 0.16 asks for and 0.19 still reads.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=2)

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any, *args: Any, **options: Any) -> Any:
        held_by_all = sharded_state_dict.pop("common_state", None)
        if held_by_all is not None and dist.get_rank() == 0:
            torch.save(held_by_all.data, Path(checkpoint_dir) / COMMON_STATE_FNAME)
        return super().async_save(sharded_state_dict, checkpoint_dir, *args, **options)


def _write_in_threads(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write each bucket into its file.

    Raises:
        Exception: what the first of the files that failed has raised.
    """
    written: queue.Queue[tuple[int, Any]] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    with ThreadPoolExecutor(len(buckets)) as pool:
        for number, bucket in enumerate(buckets):
            running.put(number)
            pool.submit(write, transforms, number, bucket, written, running, True, use_msc=use_msc)
    outcome = dict(written.get_nowait() for _ in buckets)
    for one in outcome.values():
        if isinstance(one, Exception):
            raise one
    results.put(outcome)
