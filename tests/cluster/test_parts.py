"""What the parts of engines are started with, as vLLM's own parser and configuration take it."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

import megatron_r1.cluster.parts
from megatron_r1.cluster.engines import after_another
from megatron_r1.cluster.lives import Life, Lives
from megatron_r1.cluster.needs import Part, deal, engines
from megatron_r1.cluster.parts import Follower, Head, Place, part_arguments, part_variables
from megatron_r1.errors import EngineError
from megatron_r1.rollout.server import HEADLESS_MODULE, SERVER_MODULE, SUPERVISOR_MODULE, Server
from tests.processes import command_line
from tests.rollout.tiny_classifier import write_llama, write_tokenizer
from tests.rollout.tiny_model import free_port, rollout_section, write_model

SCRIPTED_SERVER = Path(__file__).parents[1] / "rollout/scripted_server.py"
LIFE = Life(2, "10.0.0.7", 41000, 41001)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=1)


def parts(run: dict[str, Any], gpus_per_node: int) -> list[Part]:
    return [part for node in deal(list(engines(run)), gpus_per_node) for part in node]


def rollout(model: Path, *arguments: str) -> dict[str, Any]:
    section = rollout_section(9600, arguments=list(arguments)).model_dump(exclude_none=True)
    return {"model": {"path": str(model), "dtype": "float32"}, "rollout": section}


def place(folder: Path, **changes: Any) -> Place:
    return Place(**({"number": 3, "devices": [0, 1], "address": "127.0.0.1", "folder": folder, "token": "t"} | changes))


def parsed(part: Part, where: Place, module: str) -> argparse.Namespace:
    """By vLLM's parser of `vllm serve`."""
    _, _, started, *arguments = part_arguments(part, where, LIFE if part.nodes > 1 else None, 9603, on_cpu=True)
    assert started == module
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(options)
    return options


@pytest.mark.parametrize(
    ("arguments", "gpus_per_node", "count"),
    [
        (["-tp=2"], 1, 2),
        (["--data-parallel-size=4"], 2, 2),
        (["-tp=4", "-dp", "2"], 2, 4),
        (["-tp=2", "-pp=2", "-dp=2"], 4, 2),
    ],
    ids=str,
)
def test_the_ranks_of_each_part(
    model: Path, tmp_path: Path, arguments: list[str], gpus_per_node: int, count: int
) -> None:
    """vLLM works out for itself which ranks a part has: those that follow the parts before it, one for each GPU."""
    found = parts(rollout(model, *arguments), gpus_per_node)
    assert len(found) == count
    first = 0
    for part in found:
        options = parsed(part, place(tmp_path), HEADLESS_MODULE if part.rank else SERVER_MODULE)
        assert options.headless == (part.rank > 0)
        config = AsyncEngineArgs.from_cli_args(options).create_engine_config(headless=options.headless)
        ranks = config.parallel_config
        within = ranks.data_parallel_rank * ranks.world_size + ranks.node_rank_within_dp * ranks.local_world_size
        assert (within, ranks.local_world_size * ranks.data_parallel_size_local) == (first, part.gpus)
        assert (ranks.master_addr, ranks.master_port) == ("10.0.0.7", 41000)
        assert ranks.data_parallel_rpc_port == 41001
        if ranks.data_parallel_size > 1:
            assert ranks.data_parallel_master_ip == "10.0.0.7"
            assert not ranks.data_parallel_external_lb
            assert not ranks.data_parallel_hybrid_lb
        first += part.gpus
    assert first == found[0].engine.gpus


def test_an_engine_of_one_node_knows_of_no_other(model: Path, tmp_path: Path) -> None:
    (part,) = parts(rollout(model, "-tp=2"), 2)
    options = parsed(part, place(tmp_path), SERVER_MODULE)
    assert (options.nnodes, options.headless, options.port, options.host) == (1, False, 9603, "127.0.0.1")
    environment = part_variables(part, place(tmp_path))
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert environment["MEGATRON_R1_ENGINE_TOKEN"] == "t"
    assert "VLLM_HOST_IP" not in environment
    (spanning, _) = parts(rollout(model, "-tp=2"), 1)
    assert part_variables(spanning, place(tmp_path, devices=None))["VLLM_HOST_IP"] == "127.0.0.1"


def test_a_reward_model_asks_for_the_token(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "rm", 1)
    write_tokenizer(tmp_path / "corpus", folder)
    served = {"path": str(folder), "dtype": "float32", "max_model_len": 64, "arguments": ["-tp=2"]}
    for part in parts({"reward_models": {"safe": served}}, 1):
        options = parsed(part, place(tmp_path), HEADLESS_MODULE if part.rank else SERVER_MODULE)
        assert options.middleware[-1] == "megatron_r1.rollout.token_gate.TokenGate"
        assert (options.runner, options.nnodes, options.node_rank) == ("pooling", 2, part.rank)
        assert (options.host, options.max_model_len) == ("127.0.0.1", 64)


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Head, Follower]]:
    """An engine on two nodes whose parts are programs that do nothing: the head answers that it is well."""

    def started(part: Part, where: Place, life: Life | None, port: int, on_cpu: bool) -> list[str]:
        waits = [sys.executable, "-c", "import time; time.sleep(1000)"]
        return waits if part.rank else [sys.executable, str(SCRIPTED_SERVER), str(port), str(where.folder)]

    monkeypatch.setattr(megatron_r1.cluster.parts, "part_arguments", started)
    (tmp_path / "config.json").write_text("{}")
    head, other = parts(rollout(tmp_path, "-tp=2") | {"rollout": section(max_restarts=2)}, 1)
    first = Head(head, place(tmp_path))
    second = Follower(other, place(tmp_path), tmp_path / "0.engines")
    yield first, second
    first.close()
    second.close()


def section(**changes: Any) -> dict[str, Any]:
    made = rollout_section(free_port() - 3, arguments=["-tp=2"], **changes)
    return made.model_dump(mode="json", exclude_none=True)


def kill(server: Server | None) -> None:
    """All of it, at once."""
    assert server is not None
    os.killpg(server._process.pid, signal.SIGKILL)
    server._process.wait()


def test_the_parts_of_an_engine_begin_anew_together(scripted: tuple[Head, Follower], tmp_path: Path) -> None:
    head, follower = scripted
    follower.look()
    before = (head.server, follower._server)
    head.look()
    follower.look()
    assert (head.server, follower._server) == before, "nothing has happened"
    kill(follower._server)
    with pytest.raises(EngineError, match="a part of a vLLM engine has ended"):
        follower.look()  # the engine has never been ready: this is no fault that a new start mends
    (tmp_path / "0.engines").touch()
    follower.look()
    follower.look()  # says it once
    head.look()
    assert not before[0].alive(), "the head of that life is gone, too"
    assert head.server.alive()
    follower.look()
    middle = (head.server, follower._server)
    assert follower._server is not None
    assert follower._server.alive()
    kill(head.server)
    head.look()
    follower.look()
    assert middle[1] is not None
    assert not middle[1].alive(), "what has no head any more is ended"
    assert follower._server is not middle[1]
    assert (lives := Lives(tmp_path, 3).current()) is not None
    assert lives.number == 3
    assert head.failures == 2
    kill(head.server)
    with pytest.raises(EngineError, match="has ended"):  # twice is max_restarts
        head.look()


def test_what_replaces_a_killed_follower_gives_up_the_life_that_was(
    scripted: tuple[Head, Follower], tmp_path: Path
) -> None:
    """The head waits for a part that is gone, and would for ever."""
    head, follower = scripted
    follower.look()
    kill(follower._server)
    announced = tmp_path / "0.engines"
    with pytest.raises(EngineError, match="killed while the engine started"):
        Follower(follower.part, follower.place, announced, replaces=True)
    announced.touch()
    another = Follower(follower.part, follower.place, announced, replaces=True)
    try:
        another.look()
        assert another._server is None, "nothing can join what has begun"
        head.look()
        another.look()
        assert another._server is not None
        assert another._server.alive()
        assert another._life == Lives(tmp_path, 3).current()
        assert head.failures == 1
    finally:
        another.close()


def test_one_that_replaces_another_waits_for_its_engines_to_end(tmp_path: Path) -> None:
    """They listen at the ports that it needs."""
    assert not after_another(tmp_path, 0)
    assert (tmp_path / "0.pid").read_text() == str(os.getpid())
    waits = [sys.executable, "-c", "import time; time.sleep(1000)"]
    starts = (
        "import os, subprocess, sys\n"
        f"own = [sys.executable, '-m', {SUPERVISOR_MODULE!r}, str(os.getpid())]\n"
        f"subprocess.run([*own, *{waits!r}], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", starts]) as killed:
        family = running(killed.pid, 2)
        (tmp_path / "0.pid").write_text(str(killed.pid))
        killed.kill()
    assert after_another(tmp_path, 0)
    assert [process for process in family if command_line(process)] == []
    assert not after_another(tmp_path, 1), "another node"


def running(parent: int, count: int) -> list[psutil.Process]:
    """Wait until a process has so many descendants."""
    deadline = time.monotonic() + 120
    while len(found := psutil.Process(parent).children(recursive=True)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_lives(tmp_path: Path) -> None:
    """Each is another, on other ports; a part that was lost in one is not lost in the next."""
    head, other = Lives(tmp_path, 4), Lives(tmp_path, 4)
    assert other.current() is None
    first = head.begin("127.0.0.1")
    assert other.current() == first
    assert len({first.master_port, first.rpc_port}) == 2
    assert head.lost(first, 3) is None
    other.lose(first, 2)
    assert head.lost(first, 3) == 2
    assert Lives(tmp_path, 5).current() is None
    second = head.begin("127.0.0.1")
    assert (first.number, second.number) == (1, 2)
    assert head.lost(second, 3) is None
    assert other.current() == second
