"""The Piston client against a small server that speaks its API and runs programs in our own sandbox."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward.sandbox import piston
from megatron_r1.reward.sandbox.job import Program
from megatron_r1.reward.sandbox.local import Local, open_pool
from megatron_r1.reward.sandbox.piston import Piston
from tests.reward.coding import answer, question, reward, score
from tests.reward.sandbox.serving import serving

LANGUAGES = {"python": "python", "c++": "cpp"}


class PistonServer:
    """As the API's documentation describes it; `busy` requests are refused first."""

    def __init__(self, local: Local) -> None:
        self.local = local
        self.busy = 0
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []

    async def execute(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.tokens.append(request.headers.get("authorization"))
        if self.busy:
            self.busy -= 1
            return JSONResponse({"message": "Requests limited to 1 per 200ms"}, 429)
        if body["run_timeout"] > 30_000:
            return JSONResponse({"message": "run_timeout cannot exceed the configured limit of 30000"}, 400)
        return JSONResponse(await run_in_threadpool(self.answer, body))

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        limits = Limits(wall_seconds=body["run_timeout"] / 1000, memory_mib=body["run_memory_limit"] >> 20)
        program = Program(LANGUAGES[body["language"]], body["files"][0]["content"])  # type: ignore[arg-type]
        (run,) = self.local.run(program, [body["stdin"]], limits)
        stage = {
            "stdout": run.stdout,
            "stderr": run.stderr,
            "output": run.stdout + run.stderr,
            "code": 0,
            "signal": None,
        }
        if run.status == "compile_error":
            return {"language": body["language"], "compile": {**stage, "code": 1}, "run": {**stage, "stdout": ""}}
        if run.status in ("timeout", "memory"):
            stage |= {"code": None, "signal": "SIGKILL"}
        elif run.status != "ok":
            stage |= {"code": 1}
        compiled = {"compile": {**stage, "stdout": "", "code": 0, "signal": None}} if body["language"] == "c++" else {}
        return {"language": body["language"], "version": "0", **compiled, "run": stage}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[PistonServer, str]]:
    local = Local(open_pool("bubblewrap", 2))
    server = PistonServer(local)
    with serving(Starlette(routes=[Route("/api/v2/execute", server.execute, methods=["POST"])])) as url:
        yield server, url
    local.close()


def statuses(url: str, program: Program, *inputs: str, **limits: Any) -> list[tuple[str, str]]:
    client = Piston(url, None)
    runs = list(client.run(program, inputs, Limits(**{"wall_seconds": 20.0, **limits})))
    client.close()
    return [(run.status, run.stdout) for run in runs]


def test_programs(served: tuple[PistonServer, str]) -> None:
    _, url = served
    source = "n = int(input())\nprint(n, flush=True)\nif n == 2: raise SystemExit(3)\nwhile n == 3: pass"
    assert statuses(url, Program("python", source), "1", "2", "3", wall_seconds=2.0) == [
        ("ok", "1\n"),
        ("failed", "2\n"),
        ("timeout", "3\n"),
    ]
    assert statuses(url, Program("python", "print('x' * 5000)"), "", output_kib=1) == [("output", "")]


def test_cpp(served: tuple[PistonServer, str]) -> None:
    _, url = served
    assert statuses(url, Program("cpp", '#include <cstdio>\nint main() { puts("hi"); }'), "") == [("ok", "hi\n")]
    assert statuses(url, Program("cpp", "int main() { return x; }"), "") == [("compile_error", "")]


def test_what_is_sent(served: tuple[PistonServer, str]) -> None:
    server, url = served
    list(Piston(url, "secret").run(Program("python", "1"), ["in"], Limits(wall_seconds=3.0, memory_mib=100)))
    sent = server.requests[-1]
    assert (sent["language"], sent["version"], sent["stdin"]) == ("python", "*", "in")
    assert sent["files"] == [{"name": "main.py", "content": "1"}]
    assert (sent["run_timeout"], sent["compile_timeout"], sent["run_memory_limit"]) == (3000, 30_000, 100 << 20)
    assert server.tokens[-1] == "secret"


def test_the_reward_over_it(served: tuple[PistonServer, str]) -> None:
    code = reward(sandbox="piston", url=served[1], limits={"wall_seconds": 20.0})
    asked = question(stdin=[{"input": "2", "output": "4"}, {"input": "3", "output": "9"}])
    assert score(code, asked, answer("print(int(input()) ** 2)")) == 1.0
    assert score(code, asked, answer("print(int(input()) * 2)")) == 0.0
    with pytest.raises(ConfigError, match="sandbox serve"):
        score(code, question(asserts=["assert f()"]), answer("def f(): return 1"))
    code.close()


def test_a_busy_server_is_asked_again(served: tuple[PistonServer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piston, "PAUSES", (0.01,) * 3)
    server, url = served
    server.busy = 2
    assert statuses(url, Program("python", "print(1)"), "") == [("ok", "1\n")]
    server.busy = 9
    with pytest.raises(EngineError, match="429"):
        statuses(url, Program("python", "print(1)"), "")
    server.busy = 0


def test_what_it_refuses_is_told(served: tuple[PistonServer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piston, "PAUSES", (0.01,))
    with pytest.raises(EngineError, match="configured limit of 30000"):
        statuses(served[1], Program("python", ""), "", wall_seconds=31.0)
    with pytest.raises(EngineError, match="404"):
        statuses(served[1] + "/elsewhere", Program("python", ""), "")
    for address in ("http://127.0.0.1:1", "nowhere", "http://"):
        with pytest.raises(EngineError):
            statuses(address, Program("python", ""), "")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"hello", b'{"run": null}', b'{"run": 3}', b'{"compile": {}}'])
def test_another_service_is_noticed(content: bytes) -> None:
    async def execute(request: Request) -> Response:
        return Response(content)

    with (
        serving(Starlette(routes=[Route("/api/v2/execute", execute, methods=["POST"])])) as url,
        pytest.raises(EngineError),
    ):
        statuses(url, Program("python", ""), "")


@pytest.mark.parametrize(
    ("stage", "status"),
    [
        ({"code": 0, "signal": None}, "ok"),
        ({"code": 0, "signal": "SIGTERM"}, "failed"),
        ({"code": 1, "signal": None, "status": "RE"}, "failed"),
        ({"code": None, "signal": "SIGKILL", "status": "TO"}, "timeout"),
        ({"code": None, "signal": "SIGKILL", "status": "ML"}, "memory"),
        ({"code": None, "signal": "SIGKILL", "status": "OL"}, "output"),
    ],
)
def test_words_of_newer_versions(stage: dict[str, Any], status: str) -> None:
    async def execute(request: Request) -> Response:
        return JSONResponse({"run": {"stdout": "", "stderr": "", **stage}})

    with serving(Starlette(routes=[Route("/api/v2/execute", execute, methods=["POST"])])) as url:
        assert statuses(url, Program("python", ""), "") == [(status, "")]
