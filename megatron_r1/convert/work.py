"""The conversion itself: worker threads take the tasks of the plan's parts in order, within one byte budget."""

import errno
import os
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from megatron_r1.convert.budget import ByteBudget
from megatron_r1.convert.heap import keep_freed_memory
from megatron_r1.convert.plan import BUDGET, Plan, cost
from megatron_r1.convert.progress import Display, open_display
from megatron_r1.convert.target import Part, Sink, Task
from megatron_r1.convert.workspace import Workspace

_FULL = {errno.ENOSPC, errno.EDQUOT}


class _OpenPart:
    """A part that some workers are writing; the last one closes it."""

    def __init__(self, part: Part) -> None:
        self.part, self.left, self.lock = part, len(part.tasks), threading.Lock()
        self.sink: Sink | None = None


class Work:
    """Writes the parts that are not there yet.

    Args:
        plan: what is converted.
        space: where the parts stand.
        display: told of every rule's bytes.
    """

    def __init__(self, plan: Plan, space: Workspace, display: Display) -> None:
        self._plan, self._space, self._display = plan, space, display
        self._budget, self._stop = ByteBudget(BUDGET), threading.Event()

    def run(self, parts: list[Part], workers: int) -> None:
        """Write `parts`; what is unfinished when something fails is removed.

        Raises:
            UserError: of the source or the target.
            OSError: the disk is full.
        """
        keep_freed_memory(BUDGET)
        opened = [_OpenPart(part) for part in parts]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # each worker computes by itself
        try:
            with ThreadPoolExecutor(workers, "convert") as pool:
                futures = [pool.submit(self._task, part, task) for part in opened for task in part.part.tasks]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                for future in done:
                    future.result()
        except Exception as error:
            if full := _disk_full(error):
                raise full from error
            raise
        finally:
            torch.set_num_threads(threads)
            for part in opened:
                if part.sink:
                    part.sink.abandon()

    def _task(self, opened: _OpenPart, task: Task) -> None:
        source, target = self._plan.source, self._plan.target
        with opened.lock:
            opened.sink = sink = opened.sink or target.open(self._space.folder, opened.part)
        for rule in task:
            if self._stop.is_set():
                return
            with self._budget.hold(cost(source, target, rule)):
                sink.put(rule)
            self._display.advance(target.nbytes(rule))
        with opened.lock:
            opened.left -= 1
            if opened.left == 0:
                records = sink.close()
                opened.sink = None
                self._space.finished(opened.part, records)


def write_parts(plan: Plan, space: Workspace, title: str, workers: int) -> int:
    """Write all parts that an earlier run has not finished. Returns how many it had."""
    missing = [part for part in plan.parts if not space.done(part)]
    done = plan.bytes_written - sum(part.nbytes for part in missing)
    with open_display(sys.stderr, title, plan.bytes_written, done) as display:
        Work(plan, space, display).run(missing, workers)
    return len(plan.parts) - len(missing)


def _disk_full(error: BaseException | None) -> OSError | None:
    """The file system's refusal of more, wherever a writer of tensors has put it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        if os.strerror(errno.ENOSPC) in str(error):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None
