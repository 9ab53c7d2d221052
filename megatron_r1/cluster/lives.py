"""The lives of an engine that spans nodes, in files of a folder that these share.

No part of such an engine can go on without the others, and none of them notices when another is gone: it waits for it.
So its head begins it anew as a whole, on ports that nothing of the life before can reach: it writes `engine-<i>.life`,
and each other part ends what it runs and starts for the new life. A part that has died says so in
`engine-<i>.lost-<rank>`. Files are written aside and renamed.
"""

import errno
import json
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_r1.cluster.needs import Part


@dataclass(frozen=True)
class Life:
    """Where the parts of an engine meet, this time."""

    number: int
    """From 1."""
    address: str
    """Of the head."""
    master_port: int
    """Of the process group of all ranks."""
    rpc_port: int
    """Where data-parallel replicas on other nodes look for the head."""

    def arguments(self, part: Part) -> list[str]:
        """Of `vllm serve`, for one part."""
        return [
            *(f"--nnodes={part.nodes}", f"--node-rank={part.rank}"),
            *(f"--master-addr={self.address}", f"--master-port={self.master_port}"),
            f"--data-parallel-rpc-port={self.rpc_port}",
        ]


class Lives:
    """Those of one engine.

    Args:
        folder: that its nodes share.
        place: its number among all engines of the run.
    """

    def __init__(self, folder: Path, place: int) -> None:
        self._file = folder / f"engine-{place}.life"
        self._folder, self._place = folder, place
        self._number = 0
        """Of the last life that this process has begun."""

    def begin(self, address: str) -> Life:
        """The head's next, with ports that are free at its address."""
        before = self.current()
        self._number = max(self._number, before.number if before else 0) + 1
        life = Life(self._number, address, *free_ports(address, 2))
        _write(self._file, json.dumps(asdict(life)))
        return life

    def current(self) -> Life | None:
        """None before the first."""
        text = _read(self._file)
        return None if text is None else Life(**json.loads(text))

    def lose(self, life: Life, rank: int) -> None:
        """Say that a part of it has died."""
        _write(self._lost(rank), str(life.number))

    def lost(self, life: Life, nodes: int) -> int | None:
        """The first part that has died in this life."""
        for rank in range(1, nodes):
            if _read(self._lost(rank)) == str(life.number):
                return rank
        return None

    def _lost(self, rank: int) -> Path:
        return self._folder / f"engine-{self._place}.lost-{rank}"


def free_ports(address: str, count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with ExitStack() as stack:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        probes = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for probe in probes:
            probe.bind((address, 0))
        return [probe.getsockname()[1] for probe in probes]


def _read(file: Path) -> str | None:
    """None where there is none, or another node has just replaced it (NFS)."""
    try:
        return file.read_text()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESTALE}:
            return None
        raise


def _write(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text(text)
    aside.rename(file)
