"""An OpenAI-compatible endpoint on a real port that answers by a script."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.reward.sandbox.serving import serving

Answer = Response | str | dict[str, Any]
Script = Callable[[dict[str, Any]], Answer]
"""A request's JSON -> what is answered: an HTTP response, or the text or the JSON of a completion."""


def completion(text: str | None, finish_reason: str = "stop") -> JSONResponse:
    """What such an endpoint answers."""
    return JSONResponse({"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]})


@dataclass
class Endpoint:
    """The address, and what was asked."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    """Most requests that were in flight together."""


@contextmanager
def scripted(script: Script, seconds: float = 0.0) -> Iterator[Endpoint]:
    """Serve completions by `script`, each after a pause."""
    endpoint, in_flight = Endpoint(), 0

    async def complete(request: Request) -> Response:
        nonlocal in_flight
        in_flight += 1
        endpoint.at_once = max(endpoint.at_once, in_flight)
        body = await request.json()
        endpoint.requests.append(body)
        endpoint.headers.append(dict(request.headers))
        await asyncio.sleep(seconds)
        answer = script(body)
        in_flight -= 1
        if isinstance(answer, Response):
            return answer
        return completion(answer if isinstance(answer, str) else json.dumps(answer))

    async def models(request: Request) -> Response:
        return JSONResponse({"data": []})

    routes = [Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    with serving(Starlette(routes=routes)) as address:
        endpoint.url = f"{address}/v1"
        yield endpoint


def one_by_one(*answers: Answer) -> Script:
    """The first request gets the first answer, and so on; then always the last."""
    waiting = list(answers)
    return lambda body: waiting.pop(0) if len(waiting) > 1 else waiting[0]
