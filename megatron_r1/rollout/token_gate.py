"""Runs inside the vLLM server: nothing but /health answers without the token.

vLLM's own `--api-key` covers /v1 alone; our route and the routes that load weights, pause and sleep are outside it.

vLLM loads it by `--middleware megatron_r1.rollout.token_gate.TokenGate`, named last: so it stands before all others.
"""

import os
import secrets

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_VARIABLE = "MEGATRON_R1_ENGINE_TOKEN"
"""Environment variable that the server takes its token from."""
OPEN_PATHS = ("/health",)


class TokenGate:
    """ASGI middleware that wants `Authorization: Bearer <token>`.

    Raises:
        ValueError: the environment holds no token: an open server would be worse than none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        if not (token := os.environ.get(TOKEN_VARIABLE)):
            raise ValueError(f"the environment variable {TOKEN_VARIABLE} holds no token")
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS)
        if inside or secrets.compare_digest(Headers(scope=scope).get("authorization", "").encode(), self._expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("the token is missing or wrong\n", 401)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})
