"""What a node runs of an engine, as a process that can be started again: the head of the engine, or another part.

The head is what the run itself would start on its own node, but for the address. An engine that spans nodes does so in
vLLM's own way: the same arguments on all of them, with `--nnodes`, `--node-rank` and where to meet; the head alone
listens for requests. How the parts live and die together is in `lives.py`.
"""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.cluster.lives import Life, Lives
from megatron_r1.cluster.needs import Part
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import EngineError
from megatron_r1.rollout.client import CONTROL_SECONDS, Client
from megatron_r1.rollout.scorer import scoring_arguments
from megatron_r1.rollout.server import RemoteServer, Server, arguments, headless, variables
from megatron_r1.rollout.token_gate import TOKEN_VARIABLE

SETTLED_SECONDS = 600.0
"""An engine that has lived so long has not failed in a row with what was before."""
SCORER_RESTARTS = 3
"""Of a reward model, in a row."""


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    number: int
    """Of its engine among all of the run, which sets its port."""
    devices: list[int] | None
    """GPUs that it may see; None = those that this process sees."""
    address: str
    """Where other nodes reach this one."""
    folder: Path
    """Of logs and lives; all nodes see it."""
    token: str
    """What engines want to be shown."""

    @property
    def ip(self) -> str:
        """Of the address: vLLM's sockets take no names."""
        return str(socket.getaddrinfo(self.address, None)[0][4][0])


class Head:
    """A whole engine, or the part of one that answers requests.

    Raises:
        EngineError: its port is in use.
    """

    def __init__(self, part: Part, place: Place) -> None:
        self.part, self.place = part, place
        self.port = part.engine.section.port + place.number
        self.url = f"http://{place.address}:{self.port}"
        self.failures = 0
        self._lives = Lives(place.folder, place.number)
        self.start()

    def start(self) -> None:
        """Begin it, or begin it anew."""
        self._life = self._lives.begin(self.place.ip) if self.part.nodes > 1 else None
        self.server = _server(self.part, self.place, self._life, self.port)
        self.started = time.monotonic()

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Asks it whether it is well: at its address, but with the end of its log if it is not."""
        client = Client(_Reached(self.url, self.server), CONTROL_SECONDS, self.place.token)
        try:
            yield client
        finally:
            client.close()

    def look(self) -> None:
        """Start it again if it has ended, says that its core is dead, or has lost a part on another node.

        Raises:
            EngineError: that has happened too often in a row.
        """
        if not (wrong := self._wrong()):
            return
        section = self.part.engine.section
        if time.monotonic() - self.started > SETTLED_SECONDS:
            self.failures = 0
        self.failures += 1
        error = self.server.failure(wrong)
        print(f"{self.url} {wrong}: {str(error).splitlines()[-1]}", file=sys.stderr, flush=True)
        if self.failures > (section.max_restarts if isinstance(section, RolloutSection) else SCORER_RESTARTS):
            raise error
        self.server.close()
        self.start()

    def close(self) -> None:
        self.server.close()

    def _wrong(self) -> str:
        if self._life and (rank := self._lives.lost(self._life, self.part.nodes)) is not None:
            return f"has lost its part {rank} of {self.part.nodes} (log: {_log(self.place, rank).name})"
        with self.client() as client:
            starting = time.monotonic() - self.started < self.part.engine.section.start_timeout
            return "" if self.server.alive() and (starting or not client.lost()) else "has ended"


class Follower:
    """Another part of an engine that spans nodes. It does what the head's lives say.

    Args:
        announced: the file in which the head's node says that the engine can be asked.
        replaces: another that was killed, and its part with it. What is left of the engine waits for that part.

    Raises:
        EngineError: that was before the engine could be asked for the first time.
    """

    def __init__(self, part: Part, place: Place, announced: Path, replaces: bool = False) -> None:
        self.part, self.place = part, place
        self._announced = announced
        self._lives = Lives(place.folder, place.number)
        self._life: Life | None = None
        self._server: Server | None = None
        self._lost = False
        if replaces and (life := self._lives.current()):
            if not announced.exists():
                raise EngineError(f"part {part.rank} of an engine was killed while the engine started")
            self._life = life
            self._lose(life)

    def look(self) -> None:
        """Start for a new life of the engine; tell the head if this part has died.

        Raises:
            EngineError: it has died before the engine could be asked for the first time: then it is the settings.
        """
        life = self._lives.current()
        if life and life != self._life:
            self.close()
            self._server = _server(self.part, self.place, life, 0)
            self._life, self._lost = life, False
        elif self._life and self._server and not self._lost and not self._server.alive():
            error = self._server.failure("has ended")
            if not self._announced.exists():
                raise error
            print(
                f"{_log(self.place, self.part.rank).name}: {str(error).splitlines()[-1]}", file=sys.stderr, flush=True
            )
            self._lose(self._life)

    def _lose(self, life: Life) -> None:
        """Tell the head, once."""
        self._lives.lose(life, self.part.rank)
        self._lost = True

    def close(self) -> None:
        if self._server:
            self._server.close()


class _Reached(RemoteServer):
    """A server of ours at an address that others use, too."""

    def __init__(self, url: str, server: Server) -> None:
        super().__init__(url)
        self._server = server

    def alive(self) -> bool:
        return self._server.alive()

    def failure(self, what: str) -> EngineError:
        return self._server.failure(what)


def _server(part: Part, place: Place, life: Life | None, port: int) -> Server:
    environment = part_variables(part, place)
    command = part_arguments(part, place, life, port, not torch.cuda.is_available())
    key = f"port of [{part.engine.key.rpartition('.')[0]}] (engine i listens at port + i)"
    return Server(command, environment, port, _log(place, part.rank), key)


def part_arguments(part: Part, place: Place, life: Life | None, port: int, on_cpu: bool) -> list[str]:
    """The command line of a part; `life` of an engine that spans nodes."""
    engine = part.engine
    own = [f"--host={place.address}", *engine.section.arguments, *(life.arguments(part) if life else [])]
    if isinstance(engine.section, RolloutSection):
        rollout = engine.section.model_copy(update={"arguments": own})
        command = arguments(rollout, engine.model, engine.dtype, port, on_cpu)
    else:
        gate = ["--middleware=megatron_r1.rollout.token_gate.TokenGate"]
        scorer = engine.section.model_copy(update={"arguments": [*own, *gate]})
        command = scoring_arguments(scorer, port, on_cpu)
    return headless(command) if part.rank else command


def part_variables(part: Part, place: Place) -> dict[str, str]:
    """The environment of a part, besides this process's own."""
    engine, on_cpu = part.engine, not torch.cuda.is_available()
    found = variables(engine.section, engine.model, on_cpu) | {TOKEN_VARIABLE: place.token}
    if place.devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
    if part.nodes > 1:
        found["VLLM_HOST_IP"] = place.ip
    return found


def _log(place: Place, rank: int) -> Path:
    return place.folder / (f"engine-{place.number}-part-{rank}.log" if rank else f"engine-{place.number}.log")
