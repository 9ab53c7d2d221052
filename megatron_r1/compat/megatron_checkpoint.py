"""A correction of megatron-core 0.16.1's checkpoint writer, on every device."""

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def keep_results_in_process() -> None:
    """Collect the results of writing in a queue of this process.

    Upstream's (filesystem_async.py:54) belongs to a `multiprocessing.Manager`, a process that lives on when the
    run is killed, and that only asynchronous saving needs. Can go when a synchronous save starts no manager.
    """
    vars(filesystem_async)["_results_queue"] = queue.Queue()
