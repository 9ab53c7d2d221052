"""An executor on another machine: the client of `megatron-r1 sandbox serve`."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import httpx

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.job import Program, Run

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new try when the server cannot be reached or hangs up."""
QUEUE_SECONDS = 120.0
"""Longest time that a request may wait for a free place on the server."""


class Remote:
    """Runs programs on a sandbox server.

    Args:
        url: of the server, such as `https://sandbox.example:8700`.
        token: what the server was started with.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.Client(headers={"Authorization": f"Bearer {token}"})

    def run(self, program: Program, inputs: Sequence[str], limits: Limits) -> Iterator[Run]:
        """As `Executor.run`."""
        yield from self._runs("run", program, list(inputs), limits, {})

    def check(self, program: Program, prelude: str, checks: Sequence[str], limits: Limits) -> Iterator[Run]:
        """As `Executor.check`; after a lost connection the remaining checks meet a program that was started anew."""
        yield from self._runs("check", program, list(checks), limits, {"prelude": prelude})

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _runs(
        self, route: str, program: Program, tests: list[str], limits: Limits, more: dict[str, str]
    ) -> Iterator[Run]:
        done = 0
        body = {**asdict(program), **more, "limits": limits.model_dump()}
        timeout = limits.wall_seconds + limits.compile_seconds + QUEUE_SECONDS
        for pause in (*PAUSES, None):
            try:
                for run in self._request(route, {**body, "tests": tests[done:]}, timeout):
                    done += 1
                    yield run
                return
            except httpx.ReadTimeout as error:
                raise EngineError(
                    f"the sandbox server {self._url} had no answer in {timeout:g} s; if it has more to do than it can, "
                    "raise its `concurrency`, or lower `reward_workers`"
                ) from error
            except (httpx.NetworkError, httpx.ProtocolError, httpx.TimeoutException) as error:
                if pause is None:
                    raise EngineError(
                        f"the sandbox server {self._url} cannot be reached: {error or type(error).__name__}; "
                        "is `megatron-r1 sandbox serve` running there?"
                    ) from error
                time.sleep(pause)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise EngineError(f"{self._url!r} is no address of a sandbox server: {error}") from error

    def _request(self, route: str, body: dict[str, Any], timeout: float) -> Iterator[Run]:
        with self._client.stream("POST", f"{self._url}/{route}", json=body, timeout=timeout) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                reason = "it refuses the token" if response.status_code == httpx.codes.UNAUTHORIZED else response.text
                raise EngineError(f"the sandbox server {self._url} answers {response.status_code}: {reason[:500]}")
            count = 0
            for count, line in enumerate(response.iter_lines(), 1):  # noqa: B007 - counted
                yield self._run(line)
            if count != len(body["tests"]):
                raise EngineError(f"the sandbox server {self._url} answers {count} of {len(body['tests'])} tests")

    def _run(self, line: str) -> Run:
        try:
            message = json.loads(line)
            if "error" not in message:
                return Run(**message)
        except (TypeError, ValueError):
            message = {"error": f"it answers, but not as it should: {line[:500]}"}
        raise EngineError(f"the sandbox server {self._url} failed: {message['error']}")
