"""The engines of one node of a fleet: started, announced, watched, started again; they end with this process.

    srun python -m megatron_r1.cluster.engines run.toml --gpus-per-node=8 --folder=DIR

`run.toml` is a resolved run file, the node's number and address are in the environment (`slurm/lib/task.sh`). What runs
here is what the run itself would start on its own node, but for the address: these engines listen where other nodes can
reach them, and answer those alone who show the token that the environment holds. When all are ready,
`DIR/<node>.engines` says where each of them is.
"""

import argparse
import os
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_r1.cluster.needs import Engine, engines, needs
from megatron_r1.errors import ConfigError, EngineError, UserError
from megatron_r1.rollout.client import Client, wait_until_healthy
from megatron_r1.rollout.member import START_KEY
from megatron_r1.rollout.server import RemoteServer, Server, arguments, variables
from megatron_r1.rollout.token_gate import TOKEN_VARIABLE

POLL_SECONDS = 1.0
SETTLED_SECONDS = 600.0
"""An engine that has lived so long has not failed in a row with what was before."""


class NodeEngine:
    """One engine of this node.

    Args:
        engine: what the run file says of it.
        place: its number among all engines of the run, which sets its port.
        devices: the GPUs it may see; None = those that this process sees.
        address: where it listens.
        folder: of its log.
        token: what it wants to be shown.
    """

    def __init__(
        self, engine: Engine, place: int, devices: list[int] | None, address: str, folder: Path, token: str
    ) -> None:
        self.engine, self.port, self.token = engine, engine.section.port + place, token
        self.url = f"http://{address}:{self.port}"
        self._address, self._devices = address, devices
        self._log = folder / f"engine-{place}.log"
        self.failures = 0
        self.start()

    def start(self) -> None:
        """Begin it, or begin it anew."""
        engine, on_cpu = self.engine, not torch.cuda.is_available()
        section = engine.section.model_copy(
            update={"arguments": [f"--host={self._address}", *engine.section.arguments]}
        )
        environment = variables(section, engine.model, on_cpu) | {TOKEN_VARIABLE: self.token}
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._devices))
        command = arguments(section, engine.model, engine.dtype, self.port, on_cpu)
        self.server = Server(command, environment, self.port, self._log, "rollout.port (engine i listens at port + i)")
        self.started = time.monotonic()

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Asks it whether it is well: at its address, but with the end of its log if it is not."""
        asked = _Reached(self.url, self.server)
        client = Client(asked, self.engine.section.request_timeout, self.token)
        try:
            yield client
        finally:
            client.close()

    def look(self) -> None:
        """Start it again if it has ended, or says that its core is dead.

        Raises:
            EngineError: that has happened too often in a row.
        """
        with self.client() as client:
            starting = time.monotonic() - self.started < self.engine.section.start_timeout
            if self.server.alive() and (starting or not client.lost()):
                return
        if time.monotonic() - self.started > SETTLED_SECONDS:
            self.failures = 0
        self.failures += 1
        error = self.server.failure("has ended")
        print(f"{self.url}: {str(error).splitlines()[-1]}", file=sys.stderr, flush=True)
        if self.failures > self.engine.section.max_restarts:
            raise error
        self.server.close()
        self.start()

    def close(self) -> None:
        self.server.close()


class _Reached(RemoteServer):
    """A server of ours at an address that others use, too."""

    def __init__(self, url: str, server: Server) -> None:
        super().__init__(url)
        self._server = server

    def alive(self) -> bool:
        return self._server.alive()

    def failure(self, what: str) -> EngineError:
        return self._server.failure(what)


def serve(run: dict[str, Any], node: int, gpus_per_node: int, address: str, folder: Path) -> None:
    """Have the engines of a node run until this process is told to end.

    Raises:
        ConfigError: no token, or no such node.
        EngineError: an engine does not start, or has failed too often.
    """
    if not (token := os.environ.get(TOKEN_VARIABLE, "")):
        raise ConfigError(f"the environment variable {TOKEN_VARIABLE} holds no token")
    fleet = needs(run, gpus_per_node).fleet
    if node >= len(fleet):
        raise ConfigError(f"node {node}: the run file asks for {len(fleet)} nodes of engines")
    places = {(engine.key, engine.index): place for place, engine in enumerate(engines(run))}
    free = iter(range(max(gpus_per_node, 0)))
    with ExitStack() as stack:
        running = []
        for engine in fleet[node]:
            devices = [next(free) for _ in range(engine.gpus)] if gpus_per_node else None
            place = places[engine.key, engine.index]
            running.append(NodeEngine(engine, place, devices, address, folder, token))
            stack.callback(running[-1].close)
        _wait(running)
        announce(running, folder / f"{node}.engines")
        while True:
            for one in running:
                one.look()
            time.sleep(POLL_SECONDS)


def announce(running: list[NodeEngine], file: Path) -> None:
    """Say where the engines are: a line for each with key, number and address."""
    lines = [f"{one.engine.key}\t{one.engine.index}\t{one.url}\n" for one in running]
    aside = file.with_name(f".{file.name}")
    aside.write_text("".join(lines))
    aside.rename(file)


def _wait(running: list[NodeEngine]) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(one.client()) for one in running]
        wait_until_healthy(clients, max(one.engine.section.start_timeout for one in running), START_KEY)


def main() -> int:
    """Run until SIGTERM or SIGUSR1."""
    parser = argparse.ArgumentParser(description="The engines of one node of a fleet.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGUSR1):  # srun hands on the second only
        signal.signal(signum, lambda *_: sys.exit(0))
    try:
        run = tomllib.loads(options.run.read_text(encoding="utf-8"))
        node, address = int(os.environ["SLURM_NODEID"]), os.environ["MEGATRON_R1_ADDRESS"]
        serve(run, node, options.gpus_per_node, address, options.folder)
    except UserError as error:
        print(f"megatron-r1 engines: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
