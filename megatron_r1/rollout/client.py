"""The HTTP side of one vLLM server: batches of responses, weight updates, health; every call has a deadline."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engine import SAMPLE_PATH, Sampling
from megatron_r1.rollout.server import Server

HEALTH_SECONDS = 5.0
CONTROL_SECONDS = 60.0
"""Deadline of a control call (pause, resume, cache reset)."""
POLL_SECONDS = 0.25
PROGRESS_SECONDS = 15.0

logger = logging.getLogger(__name__)


class Client:
    """Calls one server; a failure of any kind becomes an `EngineError` with the end of the server's log."""

    def __init__(self, server: Server, timeout: float) -> None:
        self.server = server
        self.timeout = timeout
        self._http = httpx.Client(base_url=server.url, timeout=timeout, trust_env=False)

    def healthy(self) -> bool:
        """Does the server answer yet?"""
        try:
            return self._http.get("/health", timeout=HEALTH_SECONDS).status_code == 200
        except httpx.TransportError:
            return False

    def lost(self) -> bool:
        """Does it refuse connections, or say that its engine is dead? One that is only slow is not lost."""
        try:
            return self._http.get("/health", timeout=HEALTH_SECONDS).status_code != httpx.codes.OK
        except httpx.TimeoutException:
            return False
        except httpx.TransportError:
            return True

    def sample(
        self, prompts: list[list[int]], seeds: list[list[int]], max_tokens: list[int], sampling: Sampling
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Number of a prompt and its responses, one for each seed, as `batch_route.py` answers: as they complete."""
        request = {
            "prompts": prompts,
            "seeds": seeds,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_token_ids),
        }
        started, answered = time.monotonic(), 0
        with self._failures(SAMPLE_PATH, self.timeout):
            with self._http.stream("POST", SAMPLE_PATH, json=request) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise self._refused(SAMPLE_PATH, response.status_code, response.text)
                for line in response.iter_lines():
                    answer = json.loads(line)
                    if "error" in answer:
                        raise self._refused(SAMPLE_PATH, httpx.codes.INTERNAL_SERVER_ERROR, answer["error"])
                    if time.monotonic() - started > self.timeout:
                        raise httpx.ReadTimeout("the batch as a whole")
                    answered += 1
                    yield answer["prompt"], answer["responses"]
            if answered < len(prompts):
                raise httpx.RemoteProtocolError(f"{answered} of {len(prompts)} prompts answered")

    def update_weights(self, path: Path, version: int) -> None:
        """Follow vLLM's sequence: hold the scheduler, start, load, finish, forget what old weights computed, let go.

        Without the hold a step could meet half-loaded weights; without the reset, cached prefixes of the old weights
        would be read by the new ones. On failure the scheduler stays held: half-loaded weights must not answer.
        """
        self._call("POST", "/pause", CONTROL_SECONDS, params={"mode": "keep"})
        self._call("POST", "/start_weight_update", self.timeout)
        self._call("POST", "/update_weights", self.timeout, json={"update_info": {"path": str(path)}})
        self._call("POST", "/finish_weight_update", self.timeout, json={"weight_version": str(version)})
        reset = self._call("POST", "/reset_prefix_cache", CONTROL_SECONDS, params={"reset_running_requests": True})
        if not reset["success"]:
            raise EngineError(f"vLLM at {self.server.url} could not empty its prefix cache after a weight update")
        self._call("POST", "/resume", CONTROL_SECONDS)
        if (reported := self.weight_version()) != str(version):
            raise EngineError(f"vLLM at {self.server.url} reports weights {reported!r} after an update to {version}")

    def set_weight_version(self, version: int) -> None:
        """Name the weights that the server has loaded by itself."""
        self._call("POST", "/update_weight_version", CONTROL_SECONDS, json={"new_version": str(version)})

    def weight_version(self) -> str:
        return str(self._call("GET", "/weight_info", CONTROL_SECONDS)["weight_version"])

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, timeout: float, **request: Any) -> dict[str, Any]:
        with self._failures(path, timeout):
            response = self._http.request(method, path, timeout=timeout, **request)
        if response.status_code != httpx.codes.OK:
            raise self._refused(path, response.status_code, response.text)
        answer: dict[str, Any] = response.json()
        return answer

    @contextmanager
    def _failures(self, path: str, timeout: float) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise self.server.failure(f"did not answer {path} within {timeout:g} s") from error
        except httpx.TransportError as error:
            raise self.server.failure(f"died during {path} ({error})") from error

    def _refused(self, path: str, status: int, text: str) -> EngineError:
        return self.server.failure(f"answered {path} with {status}: {text[:500]}")


def wait_until_healthy(clients: Sequence[Client], timeout: float, key: str) -> None:
    """Wait until every server answers; `key` of the run file sets `timeout`, seconds.

    Raises:
        EngineError: a server died, or was not ready in time.
    """
    started = reported = time.monotonic()
    waiting = list(clients)
    while waiting:
        for client in clients:
            if not client.server.alive():
                raise client.server.failure("has died")
        waiting = [client for client in waiting if not client.healthy()]
        elapsed = time.monotonic() - started
        if waiting and elapsed > timeout:
            raise waiting[0].server.failure(f"was not ready after {key} = {timeout:g} s")
        if waiting and time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            logger.info("waiting for %d of %d vLLM servers, %.0f s", len(waiting), len(clients), elapsed)
        if waiting:
            time.sleep(POLL_SECONDS)
    logger.info("%d vLLM servers ready after %.1f s", len(clients), time.monotonic() - started)
