"""Engines that die, hang and talk nonsense, by script: every sample arrives once, from the right weights."""

import asyncio
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.rollout.engines import Engines
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.member import Member, Weights
from megatron_r1.rollout.responses import _within
from megatron_r1.rollout.server import RemoteServer, Server
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Sample
from tests.processes import command_line
from tests.rollout.scripted_server import response
from tests.rollout.tiny_model import decode, free_port, rollout_section

SCRIPT = Path(__file__).with_name("scripted_server.py")
PROMPTS = [[1, number + 3] for number in range(8)]
GARBAGE = (
    *("nan", "few_logprobs", "no_tokens", "too_long", "unfinished", "early_end"),
    *("old_weights", "other_sample", "positive", "malformed", "error", "cut", "aborted"),
)


class ScriptedFleet(Fleet):
    """A fleet whose servers are `scripted_server.py`, under the same supervisor."""

    def __init__(self, section: RolloutSection, folder: Path) -> None:
        (folder / "config.json").write_text('{"eos_token_id": 2}')
        self.folder = folder
        super().__init__(section, folder, folder, "float32", decode)

    def server(self, index: int) -> Server:
        port = self.section.port + index
        command = [sys.executable, str(SCRIPT), str(port), str(self.folder)]
        return Server(command, {"MEGATRON_R1_ENGINE_TOKEN": self._token}, port, self.folder / f"{index}.log", "port")

    def breaks(self, engine: int, kind: str, after: int = 0, **more: Any) -> None:
        """The engine's next request goes wrong; as `then` says, the one after it."""
        fault = {"kind": kind, "after": after, **more}
        whole = self.folder / f"{self.section.port + engine}.fault-aside"
        whole.write_text(json.dumps(fault))
        whole.replace(whole.with_suffix(".fault"))

    def holds(self, engine: int, after: int = 0, times: int = 1) -> Path:
        """The engine's next requests wait before a response, until the file that is returned is taken away."""
        file = self.folder / f"{self.section.port + engine}.hold"
        file.touch()
        self.breaks(engine, "hold", after, times=times)
        return file

    def requests(self, engine: int) -> list[dict[str, Any]]:
        """Every request that an engine has got."""
        file = self.folder / f"{self.section.port + engine}.asked"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def asked(self, engine: int) -> list[list[list[int]]]:
        """Seeds of every request that an engine has got."""
        return [request["seeds"] for request in self.requests(engine)]

    def process(self, engine: int) -> psutil.Process:
        """The server itself."""
        marker = [str(self.section.port + engine), str(self.folder)]
        running = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
        found = [one for one in running if command_line(one)[-2:] == marker]
        return next(one for one in found if "megatron_r1.rollout.supervisor" not in command_line(one))


Open = Callable[..., ScriptedFleet]


@contextmanager
def opening(folder: Path) -> Iterator[Open]:
    """Fleets that end together."""
    with ExitStack() as stack:

        def start(engines: int = 2, dispatch: str = "batch", **changes: Any) -> ScriptedFleet:
            changes = {"max_num_seqs": 4, "stall_timeout": 60.0, "max_tokens": 50, **changes}
            port = consecutive_ports(engines)
            section = rollout_section(port, engines=engines, dispatch=dispatch, start_timeout=240.0, **changes)
            return stack.enter_context(ScriptedFleet(section, folder))

        yield start


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    with opening(tmp_path) as start:
        yield start


def consecutive_ports(count: int) -> int:
    while True:
        port = free_port()
        if port + count < 65536 and all(_free(port + number) for number in range(count)):
            return port


def _free(port: int) -> bool:
    return not any(one.laddr and one.laddr.port == port for one in psutil.net_connections("tcp"))


def expected(n: int, seed: int, weights: int) -> list[list[list[int]]]:
    """Tokens of each prompt's samples, whoever answers."""
    return [
        [response(stream_seed(seed, index, sample), weights, 50)["tokens"] for sample in range(n)]
        for index in range(len(PROMPTS))
    ]


def tokens(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.tokens for sample in group] for group in groups]


def push(fleet: Fleet, folder: Path, version: int) -> None:
    """As `SharedMemorySync` does: the file is gone afterwards."""
    file = folder / f"weights-{version}"
    file.write_text(str(version))
    fleet.update_weights(file, version)
    file.unlink()


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
def test_undisturbed(opened: Open, tmp_path: Path, dispatch: str) -> None:
    fleet = opened(dispatch=dispatch)
    assert tokens(fleet.sample(PROMPTS, n=3, seed=7)) == expected(3, 7, 0)
    push(fleet, tmp_path, 4)
    arrived = list(fleet.stream(PROMPTS, n=3, seed=7))
    assert sorted(index for index, _ in arrived) == list(range(8))
    assert tokens([dict(arrived)[index] for index in range(8)]) == expected(3, 7, 4)
    assert {sample.weight_version for _, group in arrived for sample in group} == {4}
    figures = fleet.figures()
    assert (figures["engines_ready"], figures["engines_lost"], figures["samples_again"]) == (2, 0, 0)
    for engine in ("engine-0", "engine-1"):
        assert figures[f"{engine}/tokens_per_s"] > 0
        assert 1 <= figures[f"{engine}/queue"] <= 24
    assert list(fleet.stream([], n=3, seed=7)) == []


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
@pytest.mark.parametrize("kind", ["die", "hang"])
def test_one_of_two_is_lost_in_the_middle(opened: Open, tmp_path: Path, dispatch: str, kind: str) -> None:
    """Its work is done by the other (continuous) or by itself (batch); afterwards it has the newest weights.

    One that hangs is noticed by its silence. A working one may be as silent where the machine is slow: it is lost, too.
    """
    fleet = opened(dispatch=dispatch, stall_timeout=60.0 if kind == "die" else 5.0, max_restarts=10)
    push(fleet, tmp_path, 3)
    fleet.breaks(0, kind, after=2)
    arrived = list(fleet.stream(PROMPTS, n=3, seed=7))
    assert Counter(index for index, _ in arrived) == Counter(range(8))
    assert tokens([dict(arrived)[index] for index in range(8)]) == expected(3, 7, 3)
    wait_for(lambda: fleet.figures()["engines_ready"] == 2)
    assert tokens(fleet.sample(PROMPTS, n=3, seed=8)) == expected(3, 8, 3)
    wait_for(lambda: fleet.figures()["engines_ready"] == 2)
    figures = fleet.figures()
    assert figures["engines_returned"] == figures["engines_lost"] >= 1
    assert kind == "hang" or figures["engines_lost"] == 1


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_never_trained_on(opened: Open, tmp_path: Path, kind: str) -> None:
    """Alone, so that the work has to wait for the engine to come back."""
    fleet = opened(engines=1, dispatch="continuous")
    push(fleet, tmp_path, 3)
    fleet.breaks(0, kind, after=2)
    assert tokens(fleet.sample(PROMPTS, n=3, seed=7)) == expected(3, 7, 3)
    figures = fleet.figures()
    assert (figures["engines_lost"], figures["engines_returned"]) == (1, 1)
    assert 1 <= figures["samples_again"] <= 9


def test_finished_samples_are_kept_and_the_rest_is_sent_again(opened: Open, tmp_path: Path) -> None:
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=3)
    push(fleet, tmp_path, 1)
    fleet.breaks(0, "die", after=2)
    assert tokens(fleet.sample(PROMPTS[:1], n=3, seed=7)) == expected(3, 7, 1)[:1]
    seeds = [stream_seed(7, 0, sample) for sample in range(3)]
    assert fleet.asked(0) == [[seeds], [seeds[2:]]]
    assert fleet.figures()["samples_again"] == 1


def test_a_share_is_sent_again_whole(opened: Open) -> None:
    fleet = opened(engines=1)
    fleet.breaks(0, "die", after=5)
    arrived = list(fleet.stream(PROMPTS, n=3, seed=7))
    assert Counter(index for index, _ in arrived) == Counter(range(8))
    assert tokens([dict(arrived)[index] for index in range(8)]) == expected(3, 7, 0)
    first, second = fleet.asked(0)
    assert first == second


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
def test_killed_while_it_gets_weights(opened: Open, tmp_path: Path, dispatch: str) -> None:
    fleet = opened(dispatch=dispatch)
    push(fleet, tmp_path, 1)
    fleet.breaks(1, "die")
    push(fleet, tmp_path, 2)
    assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 2)
    wait_for(lambda: fleet.figures()["engines_ready"] == 2)
    assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 2)


@dataclass
class Loads:
    """An engine that loads weights until some moment, for ever, or not at all."""

    until: float

    def versions(self) -> tuple[int, int]:
        return 0, 0

    def awake(self) -> float:
        return self.until


async def never() -> None:
    await asyncio.Event().wait()


def test_an_engine_may_be_silent_for_as_long_as_it_loads() -> None:
    """The seconds that are allowed begin when it has done so."""
    assert asyncio.run(_within(asyncio.sleep(0.3, "said"), 0.01, Loads(math.inf))) == "said"
    loaded = time.monotonic() + 0.2
    for until, earliest in ((-math.inf, 0.0), (loaded, loaded + 0.01)):
        with pytest.raises(httpx.ReadTimeout):
            asyncio.run(_within(never(), 0.01, Loads(until)))
        assert time.monotonic() >= earliest


def test_all_engines_load_at_the_same_time(tmp_path: Path) -> None:
    """Each load ends when all have begun; there are more engines than a loop has threads by itself."""
    count = 48
    together = threading.Barrier(count, timeout=60)

    class Loading(Member):
        def __init__(self, number: int) -> None:
            start = lambda: RemoteServer(f"http://127.0.0.1:{number + 1}")  # noqa: E731
            super().__init__(f"engine-{number}", rollout_section(1), start, "token")

        def load(self, weights: Weights, late: bool = False) -> None:
            together.wait()
            assert self.awake == math.inf, "nobody waits for a sign of life"
            self.version = weights.version

    file = tmp_path / "weights"
    file.write_text("1")
    engines = Engines([Loading(number) for number in range(count)], rollout_section(1), Weights(0))
    try:
        engines.start(engines.update_weights(file, 1)).result(60)
        assert {member.version for member in engines.members} == {1}
        assert all(member.awake <= time.monotonic() for member in engines.members)
    finally:
        engines.close()


def test_one_that_comes_back_after_a_push_has_its_weights(opened: Open, tmp_path: Path) -> None:
    """The engine starts again while the others get new weights."""
    fleet = opened(dispatch="continuous")
    push(fleet, tmp_path, 1)
    fleet.process(0).kill()
    fleet.sample(PROMPTS, n=2, seed=3)
    push(fleet, tmp_path, 2)
    push(fleet, tmp_path, 5)
    wait_for(lambda: fleet.figures()["engines_ready"] == 2)
    assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 5)


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
def test_restarts_are_counted(opened: Open, dispatch: str) -> None:
    fleet = opened(engines=1, dispatch=dispatch, max_restarts=1)
    fleet.breaks(0, "die", times=50)
    with pytest.raises(EngineError, match=r"(?s)vLLM at http://127.0.0.1:\d+ .*the end of its log"):
        fleet.sample(PROMPTS, n=2, seed=3)
    assert fleet.figures()["engines_returned"] == 1


def test_without_restarts_the_first_loss_is_an_error(opened: Open) -> None:
    fleet = opened(max_restarts=0)
    fleet.process(1).kill()
    with pytest.raises(EngineError, match="the end of its log"):
        fleet.sample(PROMPTS, n=2, seed=3)


def test_others_go_on_without_an_engine_that_is_given_up(opened: Open) -> None:
    fleet = opened(dispatch="continuous", max_restarts=0)
    fleet.process(0).kill()
    assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 0)
    assert fleet.figures()["engines_ready"] == 1
    fleet.process(1).kill()
    with pytest.raises(EngineError, match="the end of its log"):
        fleet.sample(PROMPTS, n=2, seed=3)


def test_a_batch_takes_no_longer_than_allowed(opened: Open) -> None:
    fleet = opened(engines=1, max_restarts=0, request_timeout=1.0)
    fleet.breaks(0, "slow", after=-1, seconds=600.0)
    with pytest.raises(EngineError, match="within 1 s"):
        fleet.sample(PROMPTS, n=2, seed=3)


def test_what_nobody_waits_for_is_given_up(opened: Open) -> None:
    fleet = opened(engines=1, dispatch="continuous")
    stream = fleet.stream(PROMPTS, n=3, seed=7)
    next(stream)
    assert isinstance(stream, Generator)
    stream.close()
    assert tokens(fleet.sample(PROMPTS, n=3, seed=8)) == expected(3, 8, 0)
    assert fleet.figures()["engines_lost"] == 0


def test_two_streams_at_once(opened: Open) -> None:
    fleet = opened(dispatch="continuous")
    found: dict[int, list[list[list[int]]]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: tokens(fleet.sample(PROMPTS, n=2, seed=seed))}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert found == {seed: expected(2, seed, 0) for seed in (1, 2)}


def test_engines_at_addresses(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by others, stopped for a while, gone for a while; nothing of them is ended with the fleet."""
    theirs = opened()
    addresses = [f"http://127.0.0.1:{theirs.section.port + number}" for number in range(2)]
    changes = {"addresses": addresses, "dispatch": "continuous", "stall_timeout": 5.0}
    section = theirs.section.model_copy(update=changes)
    with pytest.raises(ConfigError, match="MEGATRON_R1_ENGINE_TOKEN"):
        Fleet(section, tmp_path, tmp_path, "float32", decode)
    monkeypatch.setenv("MEGATRON_R1_ENGINE_TOKEN", "wrong")
    with pytest.raises(EngineError, match="401"):
        Fleet(section, tmp_path, tmp_path, "float32", decode)
    monkeypatch.setenv("MEGATRON_R1_ENGINE_TOKEN", theirs._token)
    with Fleet(section, tmp_path, tmp_path, "float32", decode) as fleet:
        push(fleet, tmp_path, 2)
        stopped = theirs.process(0)
        stopped.send_signal(signal.SIGSTOP)
        assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 2)
        push(fleet, tmp_path, 3)
        stopped.send_signal(signal.SIGCONT)
        wait_for(lambda: fleet.figures()["engines_ready"] == 2)
        assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 3)
        port = theirs.section.port + 1
        theirs.process(1).kill()
        assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 3)
        again = psutil.Popen(
            [sys.executable, str(SCRIPT), str(port), str(tmp_path)],
            env=os.environ | {"MEGATRON_R1_ENGINE_TOKEN": theirs._token},
        )
        wait_for(lambda: fleet.figures()["engines_ready"] == 2)
        assert tokens(fleet.sample(PROMPTS, n=2, seed=5)) == expected(2, 5, 3)
    assert again.is_running()
    again.kill()
    again.wait()
    assert stopped.is_running()


def test_random_faults(opened: Open, tmp_path: Path) -> None:
    """Four steps with four faults each: the same samples as without any, once each, from the step's weights."""
    chance = random.Random(5)
    fleet = opened(engines=2, dispatch="continuous", max_restarts=8)
    kinds = ("die", "nan", "malformed", "cut", "error", "old_weights", "few_logprobs")
    for step in range(4):
        push(fleet, tmp_path, step)
        for _ in range(4):
            wait_for(lambda: fleet.figures()["engines_ready"] == 2)
            fleet.breaks(chance.randrange(2), chance.choice(kinds), after=chance.randrange(3))
            assert tokens(fleet.sample(PROMPTS, n=3, seed=step)) == expected(3, step, step)
    assert fleet.figures()["engines_lost"] >= 14
