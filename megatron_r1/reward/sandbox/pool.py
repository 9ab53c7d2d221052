"""Boxes that have already started wait for jobs; each is used once."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Protocol

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.box import Box, Jail

Outcome = Box | Exception
_CLOSED = EngineError("the sandbox was closed")


class Launcher(Protocol):
    """A way to confine processes."""

    def start(self, tmp_mib: int) -> Jail:
        """Start the processes of a box with a private folder of this size; it works when it answers."""
        ...

    def close(self) -> None:
        """No more boxes."""
        ...


class Pool:
    """Keeps some boxes warm; safe to use from several threads.

    One thread starts all boxes and lives as long as they do: the kernel's signal to the children of a parent that
    died is sent when the *thread* that started them ends.
    """

    def __init__(self, launcher: Launcher, warm: int, tmp_mib: int) -> None:
        """Start the first boxes.

        Args:
            launcher: starts the boxes; closed with the pool.
            warm: how many boxes wait.
            tmp_mib: of the warm boxes; another size starts a box of its own.
        """
        self._launcher = launcher
        self._warm = warm
        self._tmp_mib = tmp_mib
        self._shelf: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[tuple[int, queue.SimpleQueue[Outcome]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._taken: set[Box] = set()
        self._lock = threading.Lock()
        for _ in range(warm):
            self._orders.put((tmp_mib, self._shelf))
        self._thread = threading.Thread(target=self._serve, name="sandbox-starter", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def take(self, limits: Limits) -> Iterator[Box]:
        """A box of its own for one job; it is killed at the end.

        Raises:
            EngineError: no box starts, or the pool was closed.
        """
        box = self._begin(limits)
        try:
            yield box
        finally:
            self._drop(box)

    def close(self) -> None:
        """Kill every box, those in use included; may be called more than once."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._orders.put(None)
            taken = list(self._taken)
        for box in taken:
            box.end()
        self._thread.join()
        while not self._shelf.empty():
            outcome = self._shelf.get()
            if isinstance(outcome, Box):
                outcome.kill()
        self._shelf.put(_CLOSED)
        self._launcher.close()

    def _begin(self, limits: Limits) -> Box:
        """A box that answers. Those that waited may have been killed meanwhile; the one after them is new."""
        for _ in range(self._warm):
            box = self._next(limits)
            with contextlib.suppress(EngineError):
                box.begin(limits)
                return box
            self._drop(box)
        box = self._next(limits)
        try:
            box.begin(limits)
        except EngineError:
            self._drop(box)
            raise
        return box

    def _drop(self, box: Box) -> None:
        box.kill()
        with self._lock:
            self._taken.discard(box)

    def _next(self, limits: Limits) -> Box:
        shelf = self._shelf if limits.tmp_mib == self._tmp_mib else queue.SimpleQueue[Outcome]()
        with self._lock:
            if self._closed.is_set():
                raise _CLOSED
            self._orders.put((limits.tmp_mib, shelf))
        outcome = shelf.get()
        if outcome is _CLOSED:
            shelf.put(outcome)  # for the next who waits
            raise _CLOSED
        if isinstance(outcome, Exception):
            raise EngineError(f"a sandbox could not be started: {outcome}") from outcome
        with self._lock:
            self._taken.add(outcome)
        if self._closed.is_set():
            outcome.end()
        return outcome

    def _serve(self) -> None:
        while (order := self._orders.get()) is not None:
            tmp_mib, shelf = order
            try:
                shelf.put(Box(self._launcher.start(tmp_mib)))
            except Exception as error:  # whoever asked for the box is told
                shelf.put(error)
