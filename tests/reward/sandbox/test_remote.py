"""The sandbox server and its client, over real connections."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_r1.config.load import load
from megatron_r1.config.sandbox import Limits, SandboxServeConfig
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward.sandbox import remote
from megatron_r1.reward.sandbox.job import Program, Run
from megatron_r1.reward.sandbox.local import Local, open_pool
from megatron_r1.reward.sandbox.remote import Remote
from megatron_r1.reward.sandbox.service import application, serve
from tests.reward.coding import answer, question, reward, score
from tests.reward.sandbox.serving import serving

TOKEN = "a token of this test's own"
LIMITS = Limits(wall_seconds=20.0)
CONFIG = SandboxServeConfig(concurrency=2, limits=Limits(wall_seconds=20.0, memory_mib=256))
EXAMPLE = Path(__file__).parents[3] / "examples" / "sandbox" / "serve.toml"


class Recorder:
    """An executor that says what it was asked, slowly, and what is running in it."""

    def __init__(self) -> None:
        self.limits: list[Limits] = []
        self.running = self.most = self.done = 0
        self.closed = threading.Event()

    def run(self, program: Program, inputs: Sequence[str], limits: Limits) -> Iterator[Run]:
        self.limits.append(limits)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for text in inputs:
                if text == "broken":
                    raise EngineError("no namespaces here")
                time.sleep(0.05)
                self.done += 1
                yield Run("ok", stdout=text)
        finally:
            self.running -= 1
            self.closed.set()

    check = run  # type: ignore[assignment]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    local = Local(open_pool("bubblewrap", 2))
    with serving(application(CONFIG, TOKEN, local)) as address:
        yield address
    local.close()


@pytest.fixture
def recorder() -> Iterator[tuple[Recorder, str]]:
    recorder = Recorder()
    with serving(application(CONFIG, TOKEN, recorder)) as address:
        yield recorder, address


def test_runs_and_checks(url: str) -> None:
    client = Remote(url + "/", TOKEN)
    runs = list(client.run(Program("python", "print(input() * 2)"), ["1", "ü", ""], LIMITS))
    assert [(run.status, run.stdout) for run in runs] == [("ok", "11\n"), ("ok", "üü\n"), ("failed", "")]
    assert "EOFError" in runs[2].stderr
    program = Program("python", "def f(n): return given(n)")
    checks = ["assert f(1) == 2", "assert f(1) == 1", "assert given(1) == 2"]
    runs = list(client.check(program, "def given(n): return 2 * n", checks, LIMITS))
    assert [run.status for run in runs] == ["ok", "failed", "ok"]
    client.close()


def test_the_reward_over_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_TOKEN", TOKEN)
    code = reward(sandbox="remote", url=url, token_env="OWN_TOKEN")
    asked = question(stdin=[{"input": "", "output": "1"}], asserts=["assert f(1) == 2"])
    assert score(code, asked, answer("print(1)\ndef f(n): return n + 1")) == 1.0
    assert score(code, asked, answer("print(1)\ndef f(n): return n")) == 0.0
    code.close()


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", TOKEN, f"bearer {TOKEN}x", "Bearer é"])
def test_without_the_token_nothing_runs(recorder: tuple[Recorder, str], header: str | None) -> None:
    executor, url = recorder
    headers = {} if header is None else {"Authorization": header.encode("latin1")}
    body = {"language": "python", "source": "", "tests": ["1"]}
    for route in ("run", "check"):
        assert httpx.post(f"{url}/{route}", json=body, headers=headers).status_code == 401
    assert executor.limits == []


def test_wrong_token_is_explained(url: str) -> None:
    with pytest.raises(EngineError, match="refuses the token"):
        list(Remote(url, "another").run(Program("python", ""), [""], LIMITS))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"language": "python", "source": "", "tests": [1]}',
        b'{"language": "sh", "source": "", "tests": []}',
    ],
)
def test_what_is_no_job_is_refused(url: str, body: bytes) -> None:
    answered = httpx.post(f"{url}/run", content=body, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answered.status_code == 422


def test_limits_are_capped(recorder: tuple[Recorder, str]) -> None:
    executor, url = recorder
    asked = Limits(wall_seconds=1000.0, memory_mib=100_000, cpu_seconds=1.5)
    list(Remote(url, TOKEN).run(Program("python", ""), [""], asked))
    (found,) = executor.limits
    assert (found.wall_seconds, found.memory_mib, found.cpu_seconds) == (20.0, 256, 1.5)


def test_no_more_at_once_than_it_says(recorder: tuple[Recorder, str]) -> None:
    executor, url = recorder
    client = Remote(url, TOKEN)
    threads = [
        threading.Thread(target=lambda: list(client.run(Program("python", ""), ["a"] * 3, LIMITS))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert executor.done == 18
    assert executor.most == 2


def test_a_client_that_stops_ends_the_job(recorder: tuple[Recorder, str]) -> None:
    executor, url = recorder
    runs = Remote(url, TOKEN).run(Program("python", ""), ["a"] * 1000, LIMITS)
    assert next(runs).stdout == "a"
    runs.close()
    assert executor.closed.wait(20)
    assert executor.done < 1000


def test_a_sandbox_that_fails_is_told(recorder: tuple[Recorder, str]) -> None:
    runs = Remote(recorder[1], TOKEN).run(Program("python", ""), ["a", "broken", "b"], LIMITS)
    assert next(runs).stdout == "a"
    with pytest.raises(EngineError, match="no namespaces here"):
        next(runs)


@pytest.mark.parametrize("content", ["", "hello", "[]", '{"status": "ok", "more": 1}', '{"status": "ok"}\n' * 3])
def test_another_service_is_noticed(content: str) -> None:
    async def answer_all(request: Request) -> Response:
        return Response(content)

    with serving(Starlette(routes=[Route("/run", answer_all, methods=["POST"])])) as url, pytest.raises(EngineError):
        list(Remote(url, TOKEN).run(Program("python", ""), ["a", "b"], LIMITS))


def test_health_needs_no_token(url: str) -> None:
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_an_address_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))
    with pytest.raises(EngineError, match="sandbox serve"):
        list(Remote(f"http://127.0.0.1:{free_port()}", TOKEN).run(Program("python", ""), [""], LIMITS))
    for address in ("nowhere", "ftp://127.0.0.1", "http://"):
        with pytest.raises(EngineError):
            list(Remote(address, TOKEN).run(Program("python", ""), [""], LIMITS))


def test_a_server_with_more_to_do_than_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the program's, so the run ends rather than the sample failing its tests."""
    monkeypatch.setattr(remote, "QUEUE_SECONDS", 0.2)
    limits = Limits(wall_seconds=0.1, compile_seconds=0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(EngineError, match=r"no answer in 0\.4 s"):
        list(Remote(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN).run(Program("python", ""), [""], limits))


def test_it_goes_on_where_a_connection_broke(recorder: tuple[Recorder, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between client and server stands a relay that cuts the first two connections after a while."""
    monkeypatch.setattr(remote, "PAUSES", (0.01,) * 4)
    executor, url = recorder
    port = int(url.rpartition(":")[2])
    listener = socket.create_server(("127.0.0.1", 0))
    relay = threading.Thread(target=relay_and_cut, args=(listener, port, [0.2, 0.2, 60.0]), daemon=True)
    relay.start()
    client = Remote(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN)
    texts = [str(number) for number in range(10)]
    assert [run.stdout for run in client.run(Program("python", ""), texts, LIMITS)] == texts
    assert len(executor.limits) == 3
    client.close()
    listener.close()


def relay_and_cut(listener: socket.socket, port: int, seconds: list[float]) -> None:
    for limit in seconds:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=pump, args=(source, target), daemon=True).start()
        end = time.monotonic() + limit
        while time.monotonic() < end and near.fileno() >= 0:
            time.sleep(0.01)
        for end_of_line in (near, far):
            with contextlib.suppress(OSError):
                end_of_line.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


@pytest.mark.parametrize("token", [None, "", "short"])
def test_it_does_not_start_without_a_token(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG.token_env, raising=False)
    if token is not None:
        monkeypatch.setenv(CONFIG.token_env, token)
    with pytest.raises(ConfigError, match=CONFIG.token_env):
        serve(CONFIG)


def test_an_address_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG.token_env, TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = CONFIG.model_copy(update={"port": other.getsockname()[1]})
        with pytest.raises(ConfigError, match="cannot listen"):
            serve(taken)


def test_the_command(tmp_path: Path) -> None:
    port = free_port()
    assert load(EXAMPLE, [], SandboxServeConfig).host == "127.0.0.1"
    command = [sys.executable, "-m", "megatron_r1.cli", "sandbox", "serve", str(EXAMPLE), f"--port={port}"]
    server = subprocess.Popen(
        command, env={**os.environ, CONFIG.token_env: TOKEN}, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        client = Remote(f"http://127.0.0.1:{port}", TOKEN)
        assert [run.stdout for run in client.run(Program("python", "print(1)"), [""], LIMITS)] == ["1\n"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) in (0, 143)
    finally:
        server.kill()
        server.wait()
    assert not list(tmp_path.iterdir())


def wait_for(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url).raise_for_status()
            return
        time.sleep(0.1)
    raise AssertionError(f"{url} is not served")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
