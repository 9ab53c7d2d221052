"""The HTTP side of one vLLM server: health and weight updates; every call has a deadline."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from megatron_r1.errors import EngineError
from megatron_r1.report.spans import span
from megatron_r1.rollout.server import EngineLostError, RemoteServer, Server

HEALTH_SECONDS = 5.0
WATCH_SECONDS = 5.0
"""Between two looks at a server that has a call to answer."""
KEEPALIVE_SECONDS = 1.0
"""For which an idle connection is kept. Servers close one after 5 s, just when the next look at their health comes."""
CONTROL_SECONDS = 60.0
"""Deadline of a control call (pause, resume, cache reset)."""
POLL_SECONDS = 0.25
PROGRESS_SECONDS = 15.0

SPANS = {
    "/pause": "hold",
    "/start_weight_update": "load",
    "/update_weights": "load",
    "/finish_weight_update": "load",
    "/reset_prefix_cache": "resume",
    "/resume": "resume",
}
"""What a call counts as in the timeline of a run."""

logger = logging.getLogger(__name__)


class Client:
    """Calls one server; a failure of any kind becomes an `EngineError` with the end of the server's log.

    Args:
        timeout: seconds that a call may take.
        token: what the server wants to be shown.
    """

    def __init__(self, server: Server | RemoteServer, timeout: float, token: str | None = None) -> None:
        self.server = server
        self.timeout = timeout
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx.Client(base_url=server.url, timeout=timeout, headers=headers, limits=limits, trust_env=False)

    def healthy(self) -> bool:
        """Does the server answer yet?"""
        try:
            return self._http.get("/health", timeout=HEALTH_SECONDS).status_code == 200
        except httpx.TransportError:
            return False

    def lost(self) -> bool:
        """Does it refuse connections, or say that its engine is dead? One that is only slow is not lost."""
        for _ in range(2):  # the server closes the connection on which it has just answered with an error
            try:
                return self._http.get("/health", timeout=HEALTH_SECONDS).status_code != httpx.codes.OK
            except httpx.TimeoutException:
                return False
            except httpx.TransportError:
                continue
        return True

    def update_weights(self, path: Path, version: int) -> None:
        """Give it the weights of a file: the whole sequence of an update.

        On failure the scheduler stays held: half-loaded weights must not answer.
        """
        self.start_update()
        try:
            self.update({"path": str(path)})
        except EngineLostError:
            raise
        except EngineError:
            self.abandon_update()
            raise
        self.finish_update(version)
        self.let_go(version)

    def start_update(self) -> None:
        """Hold the scheduler, so that no step meets half-loaded weights, and begin."""
        self.hold()
        self._call("POST", "/start_weight_update", self.timeout)

    def hold(self) -> None:
        """No step begins until it is let go."""
        self._call("POST", "/pause", CONTROL_SECONDS, params={"mode": "keep"})

    def update(self, info: dict[str, Any]) -> None:
        """Have its workers take tensors, as `receiver.UpdateInfo` says."""
        self._call("POST", "/update_weights", self.timeout, json={"update_info": info})

    def finish_update(self, version: int) -> None:
        """No more tensors come."""
        self._call("POST", "/finish_weight_update", self.timeout, json={"weight_version": str(version)})

    def abandon_update(self) -> None:
        """End an update that has failed, if one is begun: the next could not begin. The scheduler stays held."""
        with suppress(EngineError):
            self._call("POST", "/finish_weight_update", CONTROL_SECONDS)

    def let_go(self, version: int) -> None:
        """Forget what old weights computed, and go on: cached prefixes would be read by the new ones."""
        reset = self._call("POST", "/reset_prefix_cache", CONTROL_SECONDS, params={"reset_running_requests": True})
        if not reset.get("success"):
            raise EngineError(f"vLLM at {self.server.url} could not empty its prefix cache after a weight update")
        self._call("POST", "/resume", CONTROL_SECONDS)
        if (reported := self.weight_version()) != str(version):
            raise EngineLostError(
                f"vLLM at {self.server.url} reports weights {reported!r} after an update to {version}"
            )

    def cut(self) -> None:
        """Hold the scheduler; all responses that are under way end where they are, and are answered so."""
        self.hold()  # tokens that it holds back are sent
        self._call("POST", "/pause", CONTROL_SECONDS, params={"mode": "abort"})  # it would throw them away

    def connect(self, info: dict[str, Any]) -> None:
        """Have its workers join the trainer, as `receiver.InitInfo` says; an earlier connection ends.

        It is held from here on: replicas that exchange tokens of experts make their steps together, and one that waits
        here for the others would be waited for in a step.
        """
        self.hold()
        self._call("POST", "/shutdown_weight_transfer_engine", CONTROL_SECONDS)
        self._call("POST", "/init_weight_transfer_engine", self.timeout, json={"init_info": info})

    def compare(self, sums: Mapping[str, str], first: int) -> int:
        """Have each worker compare tensors of this update with what was sent.

        Args:
            sums: name -> checksum.
            first: rank of its first worker in the trainer's group.

        Returns:
            How many of its first data-parallel replica's say that they have: vLLM drops what the others say.

        Raises:
            EngineError: one has got something else.
        """
        call = {"method": "compare_received", "kwargs": {"sums": dict(sums), "first": first}}
        return len(self._call("POST", "/collective_rpc", self.timeout, json=call).get("results", []))

    def workers(self, of_one_replica: bool = False) -> int:
        """How many it has, one for each of its GPUs: all, or those of one data-parallel replica."""
        counted = {"include_dp": not of_one_replica}
        return int(self._call("GET", "/get_world_size", CONTROL_SECONDS, params=counted)["world_size"])

    def set_weight_version(self, version: int) -> None:
        """Name the weights that the server has loaded by itself."""
        self._call("POST", "/update_weight_version", CONTROL_SECONDS, json={"new_version": str(version)})

    def resume(self) -> None:
        """Let the scheduler go, whoever has held it."""
        self._call("POST", "/resume", CONTROL_SECONDS)

    def sleep(self) -> None:
        """Have it give its GPUs' memory back; nothing may be asked of it until it is woken."""
        self._call("POST", "/sleep", self.timeout, params={"level": 1})

    def wake(self) -> None:
        """Have it take its memory again, and bring its weights back from the host."""
        self._call("POST", "/wake_up", self.timeout)

    def weight_version(self) -> str:
        """Of the weights that the server says it has."""
        return str(self._call("GET", "/weight_info", CONTROL_SECONDS).get("weight_version"))

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, timeout: float, **request: Any) -> dict[str, Any]:
        with self._failures(path, timeout), span(SPANS.get(path, "")):
            response = self._answer(method, path, timeout, **request)
        if response.status_code != httpx.codes.OK:
            raise self._refused(path, response.status_code, response.text)
        try:
            answer = response.json()
        except ValueError as error:
            said = self.server.failure(f"answered {path} with what is no JSON: {response.text[:200]}")
            raise EngineLostError(said) from error
        return answer if isinstance(answer, dict) else {}

    def _answer(self, method: str, path: str, timeout: float, **request: Any) -> httpx.Response:
        """A server of vLLM's never answers a call in which its core dies, so it is looked after meanwhile.

        Raises:
            httpx.TransportError: there is no answer, or will be none.
        """
        answer: Future[httpx.Response] = Future()

        def call() -> None:
            try:
                answer.set_result(self._http.request(method, path, timeout=timeout, **request))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=call, name=f"call {path}", daemon=True).start()
        while not wait([answer], WATCH_SECONDS).done:
            if self.lost() and not answer.done():
                raise httpx.ReadError("its core is dead, or it does not listen any more")
        return answer.result()

    @contextmanager
    def _failures(self, path: str, timeout: float) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise EngineLostError(self.server.failure(f"did not answer {path} within {timeout:g} s")) from error
        except httpx.TransportError as error:
            raise EngineLostError(self.server.failure(f"died during {path} ({error})")) from error

    def _refused(self, path: str, status: int, text: str) -> EngineError:
        error = self.server.failure(f"answered {path} with {status}: {text[:500]}")
        return EngineLostError(error) if self.lost() else error


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
