"""One engine of a fleet through all its lives: its server, how to talk to it, the weights that it holds."""

import asyncio
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import EngineError
from megatron_r1.rollout.client import HEALTH_SECONDS, Client, wait_until_healthy
from megatron_r1.rollout.meters import Meter
from megatron_r1.rollout.server import RemoteServer, Server

START_KEY = "rollout.start_timeout"


class Weights:
    """What engines have to hold: a safetensors file or a folder of them, or what they start with.

    A file is kept open, so an engine on this machine that starts again finds it after its name is gone, and a run that
    is killed leaves no name behind. A folder stays by itself until no engine loads it any more.

    Args:
        version: of the trainer.
        path: the file or folder.
        passed: whether they went from GPU to GPU, so that nobody can have them later.
    """

    def __init__(self, version: int, path: Path | None = None, passed: bool = False) -> None:
        self.version, self.path, self.passed = version, path, passed
        self.kept: Path | None = None
        """The same, whatever becomes of a file's name."""
        if path and path.is_dir():
            self.kept = path
        elif path:
            opened = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, opened)
            self.kept = Path(f"/proc/{os.getpid()}/fd/{opened}")


class Member:
    """An engine that may be started again.

    Args:
        name: as logs and figures call it.
        section: the run file's [rollout].
        start: begins a server; the first one is started here.
        token: what the server wants to be shown.

    Raises:
        EngineError: its port is in use.
    """

    def __init__(
        self, name: str, section: RolloutSection, start: Callable[[], Server | RemoteServer], token: str
    ) -> None:
        self.name, self.token = name, token
        self.version = -1
        """Of the weights that it holds; -1 = not known."""
        self.life = 0
        """Starts and returns so far."""
        self.ready = False
        """Is it to be asked?"""
        self.waiting = False
        """Has it come back, and has to wait for the next weights?"""
        self.failures = 0
        """Times that it was lost or did not start since it last did its work."""
        self.gone = False
        """Is it given up?"""
        self.error: EngineError | None = None
        """Why it was lost last."""
        self.awake = -math.inf
        """Since when it has not been loading weights, seconds of `time.monotonic()`; infinite while it does."""
        self.cut = False
        """Was it told to give back what it has of responses?"""
        self.meter = Meter()
        self._section = section
        self._start = start
        self._lock = threading.Lock()
        self._closed = False
        self.server = start()
        self.client = Client(self.server, section.transfer_timeout, token)
        self.health = Health(self.lost)

    @property
    def remote(self) -> bool:
        """Was it started by others?"""
        return isinstance(self.server, RemoteServer)

    def lost(self) -> bool:
        """See `Client.lost`."""
        return self.client.lost()

    def restart(self) -> None:
        """Start it anew, or wait until others have.

        Raises:
            EngineError: it does not start, or not in time.
        """
        with self._lock:
            if self._closed:
                raise EngineError(f"{self.name} is closed")
            self.version = -1
            self.server.close()
            self.client.close()
            self.server = self._start()
            self.client = Client(self.server, self._section.transfer_timeout, self.token)
        wait_until_healthy([self.client], self._section.start_timeout, START_KEY)
        if self.remote:  # it may have been out of reach for a moment, with all that it had
            self.client.resume()
            reported = self.client.weight_version()
            self.version = int(reported) if reported.isdecimal() else -1

    def load(self, weights: Weights, late: bool = False) -> None:
        """Bring it to these weights; `late`: after the push, when the file's name may be gone.

        Raises:
            EngineError: it refuses them; `EngineLostError`: it is lost.
        """
        path = weights.path
        # A name that is the number of an open file may be another file's by now.
        if late and not (self.remote and path and path.exists() and not path.is_relative_to("/proc")):
            path = weights.kept
        if path:
            self.client.update_weights(path, weights.version)
        else:
            self.client.set_weight_version(weights.version)
        self.version = weights.version

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """It loads weights, and gives no sign of life."""
        self.awake = math.inf
        try:
            yield
        finally:
            self.awake = time.monotonic()

    def terminate(self) -> None:
        """Ask its server to end, without waiting for it; it will not start again."""
        self._closed = True
        self.server.terminate()

    def close(self) -> None:
        """End its server."""
        self.terminate()
        with self._lock:
            self.server.close()
            self.client.close()


class Health:
    """Looks after an engine for all that read from it: a server whose core has died may hold its connections open.

    On the engines' loop.

    Args:
        lost: asks it.
        seconds: between two looks.
    """

    def __init__(self, lost: Callable[[], bool], seconds: float = HEALTH_SECONDS) -> None:
        self._lost, self._seconds = lost, seconds
        self._readers = 0
        self._looking: asyncio.Task[None] | None = None

    async def while_there(self, reading: Coroutine[Any, Any, None]) -> None:
        """Read on.

        Raises:
            httpx.ConnectError: the server says that its core is dead, or does not listen any more.
        """
        task = asyncio.create_task(reading)
        self._readers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        looking = self._looking
        try:
            await asyncio.wait({task, looking}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise httpx.ConnectError("it is not healthy") from looking.exception()
            task.result()
        finally:
            self._readers -= 1
            if not self._readers and self._looking:
                self._looking.cancel()
                self._looking = None  # the next reader must not wait for one that is about to end
            task.cancel()
            await asyncio.wait({task})

    async def _look(self) -> None:
        """Until it is lost."""
        while True:
            await asyncio.sleep(self._seconds)
            if await asyncio.to_thread(self._lost):
                return
