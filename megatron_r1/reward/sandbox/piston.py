"""An executor behind a Piston-shaped service: `POST /api/v2/execute` runs one program on one input."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward.sandbox.job import Program, Run, Status

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new try when the service cannot be reached or has no room."""
_LANGUAGES = {"python": ("python", "main.py"), "cpp": ("c++", "main.cpp")}
_STATUSES: dict[str, Status] = {"TO": "timeout", "OL": "output", "EL": "output", "ML": "memory"}
"""Piston's own words for why it stopped a program; others are failures."""
_log = logging.getLogger(__name__)
_BUSY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE)


class Piston:
    """Runs programs with tests of standard input; tests that call functions need an executor of this package.

    Piston compiles anew for every input, limits wall time, memory and output as it is configured, and says neither
    processor time nor (in older versions) whether SIGKILL came from the time or the memory limit; it counts as time.

    Args:
        url: of the service, without `/api/v2/execute`.
        token: sent as `Authorization`, where the service asks for one.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self._url = f"{url.rstrip('/')}/api/v2/execute"
        self._client = httpx.Client(headers={"Authorization": token} if token else {})

    def run(self, program: Program, inputs: Sequence[str], limits: Limits) -> Iterator[Run]:
        """As `Executor.run`."""
        language, name = _LANGUAGES[program.language]
        body = {
            "language": language,
            "version": "*",
            "files": [{"name": name, "content": program.source}],
            "compile_timeout": round(limits.compile_seconds * 1000),
            "run_timeout": round(limits.wall_seconds * 1000),
            "run_memory_limit": limits.memory_mib << 20,
        }
        timeout = limits.compile_seconds + limits.wall_seconds + 60.0
        for text in inputs:
            start = time.monotonic()
            answer = self._execute({**body, "stdin": text}, timeout)
            yield _run(answer, time.monotonic() - start, limits)

    def check(self, program: Program, prelude: str, checks: Sequence[str], limits: Limits) -> Iterator[Run]:
        """Not possible: Piston would run the tests inside the program's own process.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "sandbox = 'piston' runs programs on standard input only, and this question has tests that call functions; "
            "use 'bubblewrap' here, or 'remote' with `megatron-r1 sandbox serve`"
        )

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _execute(self, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        response = self._post(body, timeout)
        if not response.is_success:
            raise EngineError(f"{self._url} refuses: {response.status_code} {response.text[:500]}")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("run"), dict):
            raise EngineError(f"{self._url} answers, but not as Piston does: {response.text[:500]}")
        return answer

    def _post(self, body: dict[str, Any], timeout: float) -> httpx.Response:
        for pause in PAUSES:
            try:
                response = self._client.post(self._url, json=body, timeout=timeout)
                if response.status_code not in _BUSY:
                    return response
            except httpx.TransportError as error:
                _log.warning("%s: %s; trying again in %g s", self._url, error or type(error).__name__, pause)
            except httpx.InvalidURL as error:
                raise EngineError(f"{self._url!r} is no address: {error}") from error
            time.sleep(pause)
        try:
            return self._client.post(self._url, json=body, timeout=timeout)
        except httpx.TransportError as error:
            raise EngineError(f"{self._url} is out of reach: {error or type(error).__name__}") from error


def _run(answer: dict[str, Any], seconds: float, limits: Limits) -> Run:
    compiled = answer.get("compile")
    if isinstance(compiled, dict) and (compiled.get("code") != 0 or compiled.get("signal")):
        return Run("compile_error", stderr=str(compiled.get("stderr"))[-4000:], seconds=seconds)
    stage = answer["run"]
    stdout, stderr = str(stage.get("stdout") or ""), str(stage.get("stderr") or "")[-4000:]
    status: Status = "ok" if stage.get("code") == 0 and not stage.get("signal") else "failed"
    if stage.get("status") in _STATUSES:
        status = _STATUSES[stage["status"]]
    elif stage.get("signal") == "SIGKILL":
        status = "timeout"
    if len(stdout.encode()) > limits.output_kib << 10:
        status, stdout = "output", ""
    return Run(status, stdout, stderr, seconds)
