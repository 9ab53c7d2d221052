"""Servers that stages need: started before the first that names one, ended after the last in a row that does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_r1.config.recipe import ServiceSection
from megatron_r1.recipe.process import StageError, environment
from megatron_r1.recipe.tree import resolve

LOG_LINES = 20
"""Of a service's log in an error message."""
LOG_BYTES = 65536
"""Of its end that are read for them; a server may have logged for days."""
POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0
"""One health check may take."""
CLOSE_SECONDS = 15.0


class Service:
    """One running service, in a process group that ends with this process however that ends.

    Raises:
        StageError: it cannot be started, or something answers in its place already.
    """

    def __init__(self, name: str, section: ServiceSection, output: Path, lock: int) -> None:
        self.name, self.section = name, section
        self.log = output / "logs" / f"service-{name}.log"
        if self._answers():
            raise StageError(
                f"service {name}: something answers at {section.ready} already; stop it, or choose another port "
                f"in [services.{name}]"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        program, *arguments = resolve(section.command, output)
        command = [sys.executable if program == "python" else program, *arguments]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_r1.rollout.supervisor", str(os.getpid()), *command],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )

    def wait_until_ready(self) -> None:
        """Raises StageError if it ends or is not ready in time."""
        deadline = time.monotonic() + self.section.timeout
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                raise self._failure(f"was not ready at {self.section.ready} within {self.section.timeout:g} s")
            time.sleep(POLL_SECONDS)
        self.check()

    def check(self) -> None:
        """Raises StageError if it has ended."""
        if self._process.poll() is not None:
            raise self._failure("has ended")

    def close(self) -> None:
        """End it with all its processes."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        import httpx  # half of the time that an unchanged recipe takes, if it were imported by every one

        try:
            # Not through a proxy that the environment names: services are usually on this machine.
            return httpx.get(self.section.ready, timeout=ANSWER_SECONDS, trust_env=False).is_success
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def _failure(self, what: str) -> StageError:
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").rstrip().splitlines()
        message = [f"service {self.name} {what}; the end of its log {self.log}:", *lines[-LOG_LINES:]]
        return StageError("\n".join(message))


class Services:
    """Those of a recipe; a context manager that leaves none behind."""

    def __init__(
        self, sections: Mapping[str, ServiceSection], output: Path, lock: int, say: Callable[[str], None]
    ) -> None:
        self._sections, self._output, self._lock, self._say = sections, output, lock, say
        self._running: dict[str, Service] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.only([])

    def only(self, names: list[str]) -> None:
        """Have exactly these running.

        Raises:
            StageError: one cannot be started.
        """
        for name in [name for name in self._running if name not in names]:
            self._running.pop(name).close()
        for name in [name for name in names if name not in self._running]:
            self._say(f"starting the service {name}")
            self._running[name] = Service(name, self._sections[name], self._output, self._lock)
        for name in names:
            self._running[name].wait_until_ready()

    def check(self) -> None:
        """Raises StageError if one has ended."""
        for service in self._running.values():
            service.check()
