"""Nobody without the token gets further than the question whether a server is up."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from megatron_r1.rollout.token_gate import TOKEN_VARIABLE, TokenGate

PATHS = ("/health", "/megatron_r1/sample", "/update_weights", "/v1/completions", "/pause", "/metrics")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    async def inside(_: Request) -> PlainTextResponse:
        return PlainTextResponse("inside")

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    monkeypatch.setenv(TOKEN_VARIABLE, "right")
    routes = [Route(path, inside, methods=["GET", "POST"]) for path in PATHS]
    return TestClient(Starlette(routes=[*routes, WebSocketRoute("/ws", talk)], middleware=[Middleware(TokenGate)]))


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "right"}])
def test_only_health_is_open(client: TestClient, headers: dict[str, str]) -> None:
    for path in (*PATHS, "/health/", "//health", "/nowhere"):
        assert client.post(path, headers=headers).status_code == (200 if path == "/health" else 401), path
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", headers=headers):
        pass


def test_the_token_opens_everything(client: TestClient) -> None:
    headers = {"authorization": "Bearer right"}
    for path in PATHS:
        assert client.post(path, headers=headers).text == "inside"
    with client.websocket_connect("/ws", headers=headers):
        pass


def test_no_token_no_server(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(ValueError, match=TOKEN_VARIABLE):
        TokenGate(client.app)
