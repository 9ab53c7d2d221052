"""`megatron-r1 sandbox serve`: the local executors behind HTTP, for runs on machines that cannot have a sandbox.

`POST /run` and `POST /check` take one program with its tests as JSON and answer with one line of JSON a `Run`, as it
ends; an `{"error": ...}` line says that the sandbox itself failed. Every request but `GET /health` carries the token.
"""

import asyncio
import json
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_r1 import __version__
from megatron_r1.config.code_tests import Language
from megatron_r1.config.sandbox import Limits, SandboxServeConfig
from megatron_r1.config.section import Section
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.reward.sandbox.choice import open_local
from megatron_r1.reward.sandbox.job import Executor, Program, Run

MAX_BODY = 64 << 20
"""Bytes of a request."""
_MIN_TOKEN = 16
"""Characters; a shorter token can be guessed."""


class Job(Section):
    """The body of a request."""

    language: Language
    source: str
    prelude: str = ""
    tests: list[str]
    """Standard inputs for /run, sources for /check."""
    limits: Limits = Limits()


def serve(config: SandboxServeConfig) -> dict[str, Any]:
    """Serve until interrupted.

    Raises:
        ConfigError: the environment holds no token, or one that is too short; the address is taken.
        EngineError: the sandbox does not work on this machine.
    """
    token = os.environ.get(config.token_env, "")
    if len(token) < _MIN_TOKEN:
        raise ConfigError(
            f"the environment variable {config.token_env} has to hold the token that clients send, of {_MIN_TOKEN} "
            "characters or more: python3 -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    with _listen(config) as listener:
        executor = open_local(config.sandbox, config.limits, warm=2 * config.concurrency)
        try:
            app = application(config, token, executor)
            print(f"{config.sandbox} sandbox at http://{config.host}:{config.port}; Ctrl-C ends it", file=sys.stderr)
            options = uvicorn.Config(app, access_log=False, server_header=False, log_level="warning")
            uvicorn.Server(options).run([listener])
        finally:
            executor.close()
    return {}


def _listen(config: SandboxServeConfig) -> socket.socket:
    try:
        return socket.create_server((config.host, config.port))
    except OSError as error:
        raise ConfigError(f"cannot listen at {config.host} port {config.port}: {error.strerror or error}") from error


def application(config: SandboxServeConfig, token: str, executor: Executor) -> Starlette:
    """The service as an ASGI application; `executor` is used by `config.concurrency` threads at most."""
    service = _Service(config, token, executor)
    routes = [
        Route("/health", service.health),
        Route("/run", service.run, methods=["POST"]),
        Route("/check", service.check, methods=["POST"]),
    ]
    return Starlette(routes=routes)


class _Service:
    def __init__(self, config: SandboxServeConfig, token: str, executor: Executor) -> None:
        self._config = config
        self._token = f"Bearer {token}".encode()
        self._executor = executor
        self._places = asyncio.Semaphore(config.concurrency)

    async def health(self, request: Request) -> Response:
        """What serves here; needs no token."""
        return JSONResponse({"status": "ok", "sandbox": self._config.sandbox, "version": __version__})

    async def run(self, request: Request) -> Response:
        """`Executor.run` of the request's job."""
        return await self._answer(
            request, lambda job, limits: self._executor.run(Program(job.language, job.source), job.tests, limits)
        )

    async def check(self, request: Request) -> Response:
        """`Executor.check` of the request's job."""
        return await self._answer(
            request,
            lambda job, limits: self._executor.check(Program(job.language, job.source), job.prelude, job.tests, limits),
        )

    async def _answer(self, request: Request, start: Callable[[Job, Limits], Iterable[Run]]) -> Response:
        if not secrets.compare_digest(request.headers.get("authorization", "").encode(), self._token):
            return PlainTextResponse("the token is wrong", 401)
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY:
                    return PlainTextResponse(f"the request has more than {MAX_BODY} bytes", 413)
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        try:
            job = Job.model_validate_json(bytes(body), strict=True)
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, part['loc'])) or 'body'}: {part['msg']}" for part in error.errors())
            return PlainTextResponse(f"not a job: {'; '.join(wrong)}", 422)
        lines = self._lines(lambda: start(job, _capped(job.limits, self._config.limits)))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def _lines(self, start: Callable[[], Iterable[Run]]) -> AsyncIterator[str]:
        """One line a run; a client that hangs up has the rest not done."""
        async with self._places:
            runs: Iterator[Run] | None = None
            try:
                runs = iter(await run_in_threadpool(start))
                while (run := await run_in_threadpool(next, runs, None)) is not None:
                    yield json.dumps(asdict(run)) + "\n"
            except UserError as error:
                yield json.dumps({"error": str(error)}) + "\n"
            finally:
                if isinstance(runs, Generator):
                    runs.close()


def _capped(asked: Limits, most: Limits) -> Limits:
    """The smaller of each limit."""
    both = zip(asked.model_dump().items(), most.model_dump().values(), strict=True)
    return Limits(**{name: min(value, bound) for (name, value), bound in both})
