"""Processes that verify, each with a time limit for every single sample.

Not a general process pool: a worker answers sample by sample, so the one that hangs or kills its worker is
known without repeating the others, and the rest of its request goes to a fresh worker. (pebble's pool limits
whole calls, and reports all of them broken when a worker dies right after it took one.)
"""

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any

from megatron_r1.config.section import Component
from megatron_r1.errors import EngineError, UserError
from megatron_r1.reward.worker import Call, Ready, Verdict, serve
from megatron_r1.types import Group, Sample

# Spawned, not forked: the trainer's process holds threads and device state.
_CONTEXT = multiprocessing.get_context("spawn")
_START_LIMIT = 120.0
"""Seconds for a worker to import its rewards and tasks."""


class Verifiers:
    """Workers, and a thread for each that feeds it.

    Args:
        rewards: sections of the rewards, without `weight`.
        tasks: sections of the tasks that each worker loads before its first request.
        workers: how many processes.
        limits: seconds that one sample may take with each reward.
    """

    def __init__(
        self, rewards: dict[str, Component], tasks: Sequence[Component], workers: int, limits: dict[str, float]
    ) -> None:
        self._closed = threading.Event()
        self._workers = [_Worker(rewards, tasks, limits, self._closed) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    def submit(self, calls: list[Call]) -> "Future[list[Verdict]]":
        """The verdicts of all samples of `calls`, in order; an empty list starts a worker."""
        return self._threads.submit(self._run, calls)

    def close(self) -> None:
        """Kill the workers, whatever they are doing."""
        self._closed.set()
        for worker in self._workers:
            worker.kill(grace=0)
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:  # one may have been started meanwhile
            worker.kill(grace=0)

    def _run(self, calls: list[Call]) -> list[Verdict]:
        worker = self._idle.get()
        try:
            return worker.verdicts(calls)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the connection to it; started when needed, replaced when killed."""

    def __init__(
        self,
        rewards: dict[str, Component],
        tasks: Sequence[Component],
        limits: dict[str, float],
        closed: threading.Event,
    ) -> None:
        self._sections = (rewards, tasks)
        self._limits = limits
        self._closed = closed
        self._process: SpawnProcess | None = None
        self._connection: Connection

    def verdicts(self, calls: list[Call]) -> list[Verdict]:
        """One verdict a sample.

        Raises:
            ConfigError: what the worker met is a mistake in the run file.
            EngineError: the worker does not start, or the judge was closed.
        """
        singles = [
            (name, Group(group.question, [], [_judged(sample)])) for name, group in calls for sample in group.samples
        ]
        verdicts: list[Verdict] = []
        asked_again: int | None = None
        self._ensure_running()
        while len(verdicts) < len(singles):
            self._ensure_running()
            try:
                self._connection.send(singles[len(verdicts) :])
                while len(verdicts) < len(singles):
                    limit = self._limits[singles[len(verdicts)][0]]
                    verdicts.append(self._receive(limit))
            except TimeoutError:
                self.kill()
                verdicts.append(Verdict(None, error=f"no verdict in {limit:g} s", timed_out=True))
            except (EOFError, OSError):
                code = self.kill()
                # A process does not do this to itself: the kernel did, or a person, perhaps because of another sample.
                if code == -signal.SIGKILL and asked_again != len(verdicts):
                    asked_again = len(verdicts)
                    continue
                verdicts.append(Verdict(None, error=f"its worker died (exit code {code})"))
        return verdicts

    def kill(self, grace: float = 0.1) -> int | None:
        """End the process, if there is one; its exit code.

        Within `grace` seconds a worker that is dying by itself leaves its own exit code.
        """
        if self._process is None:
            return None
        self._process.join(grace)
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    def _receive(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            raise TimeoutError
        message = self._connection.recv()
        if isinstance(message, UserError):
            self.kill()
            raise message
        return message

    def _ensure_running(self) -> None:
        self._leave_if_closed()
        if self._process is not None and self._process.is_alive():
            return
        self._connection, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=serve, args=(theirs, *self._sections), daemon=True)
        resource_tracker.ensure_running()  # by itself, start() would launch it and undo the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the child inherits it: Ctrl-C is the run's
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._process = process  # only now: `close` may come from another thread, and kills what has started
        theirs.close()
        self._leave_if_closed()  # it came before that, and killed nothing
        try:
            ready = self._receive(_START_LIMIT)
        except TimeoutError as error:
            self.kill()
            raise EngineError(f"a reward worker was not ready after {_START_LIMIT:g} s of imports") from error
        except (EOFError, OSError) as error:
            raise EngineError(
                f"a reward worker died at start (exit code {self.kill()}); its own message stands above"
            ) from error
        assert isinstance(ready, Ready)

    def _leave_if_closed(self) -> None:
        if self._closed.is_set():
            self.kill(grace=0)
            raise EngineError("the judge was closed while it was verifying")


def _judged(sample: Sample) -> Sample:
    """What a reward reads, without what is known of each token, which would have to be sent."""
    return replace(sample, tokens=[], logprobs=[], mask=[], rewards={}, routed_experts=None)
