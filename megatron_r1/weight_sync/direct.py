"""Weights from the first rank's GPU into the engines' GPUs: over NCCL, or by CUDA IPC within one GPU.

No tensor goes through the host, and no copy is kept: an engine that comes back gets the next push.
"""

import time
from typing import Literal, Protocol

from megatron_r1.config.sections import RolloutSection
from megatron_r1.rollout.member import Member
from megatron_r1.rollout.sender import Sender
from megatron_r1.weight_sync.named_tensors import NamedTensors

GIB = 2**30
Transport = Literal["nccl", "ipc"]


class Engines(Protocol):
    """What takes weights (`Fleet`)."""

    def pass_weights(self, send: "Send", version: int) -> None:
        """See `Fleet.pass_weights`."""
        ...


class Send(Protocol):
    """Sends to these engines."""

    def __call__(self, members: list[Member], /) -> None: ...


class DirectSync:
    """See `WeightSync`.

    Args:
        engines: what takes the weights.
        transport: how.
        section: the run file's [rollout].
    """

    def __init__(self, engines: Engines, transport: Transport, section: RolloutSection) -> None:
        self._engines, self.transport = engines, str(transport)
        self._sender = Sender(transport, int(section.transfer_buffer_gib * GIB), section.transfer_timeout)

    def push(self, tensors: NamedTensors, version: int) -> float:
        started = time.perf_counter()

        def send(members: list[Member]) -> None:
            self._sender.send(members, tensors, tensors.specs, version)

        self._engines.pass_weights(send, version)
        return time.perf_counter() - started

    def close(self) -> None:
        """Leave the group."""
        self._sender.close()
