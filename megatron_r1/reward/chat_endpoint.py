"""Questions to a model behind an OpenAI-compatible `/chat/completions`, answered by checked JSON or by text.

An endpoint may be busy, slow, wrong or gone. Whatever goes wrong is asked again a few times, then counted, and the
question stays without an answer (None): nothing is made up, and one that never works stops the run.
"""

import asyncio
import json
import os
import random
from collections import Counter
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict

from megatron_r1.config.chat_endpoint import ChatEndpointSection
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward import background
from megatron_r1.reward.prompt import Messages
from megatron_r1.wording import counted

TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP answers that mean: try again later."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts, whatever the endpoint asks for."""
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Verdict(BaseModel):
    """What a judge answers; its fields, in their order, become the JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)


V = TypeVar("V", bound=Verdict)
T = TypeVar("T")


class _AttemptError(Exception):
    """One attempt came to nothing.

    Args:
        kind: key of the counter.
        detail: for people.
        again: whether another attempt may help.
        pause: seconds that the endpoint asks to wait.
    """

    def __init__(self, kind: str, detail: str, again: bool = True, pause: float = 0.0) -> None:
        super().__init__(detail)
        self.kind, self.again, self.pause = kind, again, pause


class ChatEndpoint:
    """Asks many questions at a time; each gets its answer as a future.

    A future raises `ConfigError` when the endpoint does not accept the key, the address or the model's name, and
    `EngineError` when `give_up_after` questions in a row have failed.
    """

    def __init__(self, section: ChatEndpointSection) -> None:
        self.section = section
        self.url = section.url.rstrip("/").removesuffix("/chat/completions")
        self.counters: Counter[str] = Counter(
            dict.fromkeys(("failed", "timeouts", "unreachable", "refused", "nonsense"), 0)
        )
        """`failed`: questions without an answer; the others: attempts by what went wrong."""
        self._failed_in_a_row = 0

    def prepare(self) -> None:
        """Find out whether there is an endpoint at all.

        Raises:
            ConfigError: no key in the environment variable, or one that is not accepted.
            EngineError: nothing answers at the address.
        """
        self._headers  # noqa: B018 (missing keys are found here)
        try:
            answer = httpx.get(
                f"{self.url}/models", headers=self._headers, timeout=self.section.timeout, trust_env=self._trust_env
            )
        except httpx.HTTPError as error:
            raise EngineError(f"no model answers at {self.url} ({error}): start it, or mend `url`") from error
        if answer.status_code in (401, 403):
            raise self._not_accepted(answer)

    def ask(self, messages: Messages, verdict: type[V], seed: int = 0) -> "Future[V | None]":
        """The answer as a `verdict`; None when all attempts failed.

        Args:
            messages: the chat.
            verdict: what the answer has to be; the endpoint is constrained to its JSON schema.
            seed: of the endpoint's sampling; another one each time a question is asked once more.
        """
        form = {"name": verdict.__name__, "strict": True, "schema": verdict.model_json_schema()}
        constraint = {"response_format": {"type": "json_schema", "json_schema": form}}

        async def attempt(number: int) -> V:
            text = await self._complete(messages, seed + number, constraint if self.section.json_schema else {})
            return _parse(text, verdict)

        return background.submit(self._answer(attempt))

    def text(self, messages: Messages, seed: int = 0) -> "Future[str | None]":
        """The answer as a text; None when all attempts failed, or when it was cut at `max_tokens`."""

        async def attempt(number: int) -> str:
            return await self._complete(messages, seed + number, {})

        return background.submit(self._answer(attempt))

    async def _answer(self, attempt: Any) -> Any:
        """The first attempt that works; the place in the queue is kept until then."""
        async with self._slots:
            for number in range(self.section.retries + 1):
                try:
                    answer = await attempt(number)
                except _AttemptError as failure:
                    self.counters[failure.kind] += 1
                    last = failure
                    if not failure.again or number == self.section.retries:
                        break
                    pause = self.section.backoff * 2**number * random.uniform(0.5, 1.5)
                    await asyncio.sleep(min(max(pause, failure.pause), LONGEST_PAUSE))
                else:
                    self._failed_in_a_row = 0
                    return answer
        self.counters["failed"] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.section.give_up_after:
            raise EngineError(
                f"the model at {self.url} has failed {counted(self._failed_in_a_row, 'question')} in a row, each asked "
                f"{counted(self.section.retries + 1, 'time')}; the last time: {last}"
            )
        return None

    async def _complete(self, messages: Messages, seed: int, constraint: dict[str, Any]) -> str:
        """One answer's text.

        Raises:
            _AttemptError: there is none.
            ConfigError: the endpoint will not answer any question.
        """
        request = {
            "model": self.section.model,
            "messages": messages,
            "temperature": self.section.temperature,
            "max_tokens": self.section.max_tokens,
            "seed": seed % 2**31,
            **constraint,
            **self.section.extra,
        }
        try:
            async with asyncio.timeout(self.section.timeout):
                answer = await self._http.post("/chat/completions", json=request)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _AttemptError("timeouts", f"no answer within {self.section.timeout:g} s") from error
        except httpx.HTTPError as error:
            raise _AttemptError("unreachable", f"{type(error).__name__}: {error}") from error
        self._check_status(answer)
        try:
            choice = answer.json()["choices"][0]
            text, finished = choice["message"]["content"], choice.get("finish_reason") != "length"
        except (ValueError, LookupError, TypeError) as error:
            raise _AttemptError("nonsense", f"not a chat completion: {answer.text[:200]!r}") from error
        if not isinstance(text, str) or not finished:
            raise _AttemptError("nonsense", f"no text, or cut at max_tokens: {str(text)[:200]!r}")
        return text

    def _check_status(self, answer: httpx.Response) -> None:
        if answer.status_code == httpx.codes.OK:
            return
        if answer.status_code in (401, 403, 404):
            raise self._not_accepted(answer)
        again = answer.status_code in TRANSIENT
        detail = f"HTTP {answer.status_code}: {answer.text[:200]}"
        raise _AttemptError("refused", detail, again, _seconds(answer.headers.get("retry-after")))

    def _not_accepted(self, answer: httpx.Response) -> ConfigError:
        return ConfigError(
            f"{answer.url} answers HTTP {answer.status_code} ({answer.text[:200]}): check `url`, `model` = "
            f"{self.section.model!r} and `api_key_env` = {self.section.api_key_env!r}"
        )

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.section.max_concurrency)
        return httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=None, limits=limits, trust_env=self._trust_env
        )

    @cached_property
    def _slots(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self.section.max_concurrency)

    @cached_property
    def _headers(self) -> dict[str, str]:
        name = self.section.api_key_env
        if name is None:
            return {}
        if not (key := os.environ.get(name)):
            raise ConfigError(f"api_key_env: the environment variable {name!r} is not set")
        return {"Authorization": f"Bearer {key}"}

    @property
    def _trust_env(self) -> bool:
        """Whether a proxy of the environment may stand between."""
        return urlsplit(self.url).hostname not in LOOPBACK


def _parse(text: str, verdict: type[V]) -> V:
    """The JSON object in an answer, behind any reasoning and whatever fence stands around it.

    Line breaks inside strings are let pass: some constrained decoders allow them, and models write them.
    """
    text = text.rpartition("</think>")[2]
    try:
        return verdict.model_validate(json.loads(text[text.find("{") : text.rfind("}") + 1], strict=False))
    except (ValueError, RecursionError) as error:  # no JSON, or none of this schema
        raise _AttemptError("nonsense", f"not a {verdict.__name__}: {text[:200]!r}") from error


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; one with a date counts as none."""
    return float(header) if header and header.isdecimal() else 0.0
