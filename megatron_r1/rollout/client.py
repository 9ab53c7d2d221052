"""The HTTP side of one vLLM server: batches of responses, weight updates, health; every call has a deadline."""

from pathlib import Path
from typing import Any

import httpx

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engine import SAMPLE_PATH, Sampling
from megatron_r1.rollout.server import Server

HEALTH_SECONDS = 5.0
CONTROL_SECONDS = 60.0
"""Deadline of a control call (pause, resume, cache reset)."""


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
    ) -> list[list[dict[str, Any]]]:
        """One response for each seed of each prompt, as `batch_route.py` answers."""
        request = {
            "prompts": prompts,
            "seeds": seeds,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_token_ids),
        }
        responses: list[list[dict[str, Any]]] = self._call("POST", SAMPLE_PATH, self.timeout, json=request)["responses"]
        return responses

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
        try:
            response = self._http.request(method, path, timeout=timeout, **request)
        except httpx.TimeoutException as error:
            raise self.server.failure(f"did not answer {path} within {timeout:g} s") from error
        except httpx.TransportError as error:
            raise self.server.failure(f"died during {path} ({error})") from error
        if response.status_code != httpx.codes.OK:
            raise self.server.failure(f"answered {path} with {response.status_code}: {response.text[:500]}")
        answer: dict[str, Any] = response.json()
        return answer
