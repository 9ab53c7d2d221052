"""Is a node fit for a run? Once for each GPU of each node, by Slurm; what is wrong goes into `<folder>/<node>`.

    srun python -m megatron_r1.cluster.health --folder=DIR --store=HOST:PORT --gpus=8 --path=RUNS --nodes=n1,n2

The first line of the file is `well` or `bad`, then come lines `bad: ...` and `note: ...`. A node without a file has
failed, too. What a node by itself can know is in `node_checks.py`. Here nodes meet: their clocks are compared, and
all-reduces go over the GPUs of one node, then over pairs of nodes, each node with two others.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.cluster.node_checks import Findings, look

MEET_SECONDS = 120.0
"""In which all nodes have to have come."""
REDUCE_SECONDS = 60.0
"""In which an all-reduce has to be over, the start of its communicator included."""
CLOCK_SECONDS = 2.0
"""Two clocks may differ by."""
GPU_BYTES, CPU_BYTES = 256 * 2**20, 2**20
"""Of an all-reduce."""


class MissingError(Exception):
    """Nodes that have not come."""


@dataclass
class Meeting:
    """One rank among those of all nodes."""

    store: dist.Store
    node: int
    nodes: Sequence[str]
    """Names of all."""
    local: int
    """Rank on this node."""
    per_node: int
    findings: Findings = field(default_factory=Findings)

    def gather(self, seconds: float = MEET_SECONDS) -> None:
        """Wait for the ranks of all nodes.

        Raises:
            MissingError: not all have come in time.
        """
        self.store.add(f"here/{self.node}", 1)
        self.store.add("here", 1)
        deadline = time.monotonic() + seconds
        while self.store.add("here", 0) < len(self.nodes) * self.per_node:
            if time.monotonic() > deadline:
                here = [self.store.add(f"here/{node}", 0) for node in range(len(self.nodes))]
                missing = [name for name, ranks in zip(self.nodes, here, strict=True) if ranks < self.per_node]
                raise MissingError(f"not here after {seconds:g} s, so nothing was compared: {', '.join(missing)}")
            time.sleep(0.1)

    def compare_clocks(self) -> None:
        """Note the time at one moment on all nodes, and tell whose clock is off."""
        if self.local:
            return
        self.store.set(f"clock/{self.node}", repr(time.time()))
        times = [float(self.store.get(f"clock/{node}")) for node in range(len(self.nodes))]
        off = times[self.node] - statistics.median(times)
        if abs(off) > CLOCK_SECONDS:
            self.findings.bad.append(f"its clock is {off:+.1f} s off that of the other nodes")

    def reduce(self) -> None:
        """All-reduces with others; a node is bad if none of its partners gets through with it."""
        alone = self._together("alone", [self.node])
        if alone:
            self.findings.bad.append(f"all-reduce within the node: {alone}")
            return
        partners = pairs(self.node, len(self.nodes))
        failures = [(group, said) for group in partners if (said := self._together("pair", group))]
        others = [self.nodes[other] for group, _ in failures for other in group if other != self.node]
        if failures and len(failures) == len(partners):
            self.findings.bad.append(f"all-reduce with {' and '.join(others)}: {failures[0][1]}")
        elif failures:
            self.findings.notes.append(f"all-reduce with {others[0]}: {failures[0][1]}")

    def _together(self, kind: str, group: list[int]) -> str:
        """One all-reduce; what went wrong, or nothing. It is left behind if it hangs."""
        said = [f"not over after {REDUCE_SECONDS:g} s"]

        def attempt() -> None:
            try:
                said[0] = self._all_reduce(f"{kind}/{min(group)}-{max(group)}", group)
            except (RuntimeError, ValueError) as error:
                said[0] = str(error).splitlines()[0][:200]

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(REDUCE_SECONDS)
        return said[0]

    def _all_reduce(self, name: str, group: list[int]) -> str:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", self.local) if on_gpu else torch.device("cpu")
        world, rank = len(group) * self.per_node, group.index(self.node) * self.per_node + self.local
        store = dist.PrefixStore(name, self.store)
        limit = timedelta(seconds=REDUCE_SECONDS)
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
        try:
            values = torch.full(((GPU_BYTES if on_gpu else CPU_BYTES) // 4,), float(rank + 1), device=device)
            dist.all_reduce(values)  # also makes the communicator
            expected = world * (world + 1) / 2
            if not bool((values == expected).all()):
                return f"the sum is {values.min().item():g} to {values.max().item():g}, not {expected:g}"
            started = time.perf_counter()
            dist.all_reduce(values)
            if on_gpu:
                torch.cuda.synchronize()
            speed = values.nbytes / (time.perf_counter() - started) / 1e9
            self.findings.notes.append(f"{name}: {speed:.1f} GB/s")
        finally:
            dist.destroy_process_group()
        return ""


def pairs(node: int, nodes: int) -> list[list[int]]:
    """The pairs that a node is in, in two rounds: (0, 1), (2, 3), ..., then (1, 2), (3, 4), ..., and the last with 0.

    Of an odd number one node sits each round out: the last, then the first.
    """
    rounds = [node ^ 1, ((node + 1) ^ 1) - 1]
    if nodes % 2 == 0:
        rounds[1] %= nodes
    found = [sorted((node, other)) for other in rounds if 0 <= other < nodes and other != node]
    return found[:1] if len(found) > 1 and found[0] == found[1] else found


def meet(
    address: str, node: int, nodes: Sequence[str], local: int, per_node: int, seconds: float = MEET_SECONDS
) -> Meeting | None:
    """Where ranks come together; None if the first node, which has the store, cannot be reached."""
    host, _, port = address.rpartition(":")
    first, limit = node == 0 and local == 0, timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(host, int(port), len(nodes) * per_node, first, limit, wait_for_workers=False)
    except RuntimeError:  # DistNetworkError and DistStoreError among them
        return None
    return Meeting(store, node, nodes, local, per_node)


def main() -> int:
    """Write the file; the exit code says nothing."""
    parser = argparse.ArgumentParser(description="Whether a node is fit for a run.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--nodes", type=lambda text: text.split(","), required=True, help="names, in Slurm's order")
    options = parser.parse_args()
    node, nodes = int(os.environ["SLURM_NODEID"]), options.nodes
    local, per_node = int(os.environ["SLURM_LOCALID"]), max(options.gpus, 1)
    findings = Findings() if local else look(options.gpus, options.path, os.environ.get("HEALTH_COMMAND", ""))
    meeting = meet(options.store, node, nodes, local, per_node)
    if meeting:
        meeting.findings = findings
        _compare(meeting)
    else:
        findings.notes.append(f"{nodes[0]}, the first node of the job, could not be reached")
    if not local or findings.bad:
        findings.write(options.folder / nodes[node])
    if meeting:
        _part(meeting)
    sys.stdout.flush()
    os._exit(0)  # a communicator that hangs would keep the process


def _compare(meeting: Meeting) -> None:
    """All that takes several nodes. A node that does not come says nothing of the others."""
    try:
        meeting.gather()
        meeting.compare_clocks()
        meeting.reduce()
    except (MissingError, RuntimeError) as error:  # the first node's end is a RuntimeError
        wrong = str(error).splitlines()[0]
        meeting.findings.notes.append(wrong)
        print(f"{meeting.nodes[meeting.node]}: {wrong}", file=sys.stderr)


def _part(meeting: Meeting) -> None:
    """Say that this rank is done; the first, in which the store lives, lets the others finish."""
    with suppress(RuntimeError):
        meeting.store.add("done", 1)
        deadline = time.monotonic() + 3 * REDUCE_SECONDS
        while meeting.node == meeting.local == 0 and time.monotonic() < deadline:
            if meeting.store.add("done", 0) == meeting.store.add("here", 0):
                break
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
