"""The learner's side of vLLM's weight transfer: NCCL or CUDA IPC, from the first rank into all engines of a fleet.

vLLM's trainer engines do the sending (`NCCLTrainerWeightTransferEngine`, `IPCTrainerWeightTransferEngine`): tensors are
packed into a buffer as they come, and over NCCL a full one goes out while the next is filled. Here are the deadline,
what is said when something fails, and a group that is made anew when engines come and go.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from megatron_r1.errors import EngineError
from megatron_r1.rollout.checksum import checksum, sampled
from megatron_r1.rollout.fan_out import FanOut, Recipient, TransferError
from megatron_r1.rollout.ipc_sender import IpcFromFirstRank
from megatron_r1.rollout.server import EngineLostError

ENDING_SECONDS = 30.0
"""For a transfer that was broken off to let go of the tensors."""


class Described(Protocol):
    """A tensor without its values."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Source(WeightSource):
    """The tensors of one push, in their order, on the device that sends; knows how far it has come."""

    def __init__(self) -> None:
        self.specs: Mapping[str, Described] = {}
        self.tensors: Iterable[tuple[str, torch.Tensor]] = ()
        self.sampled: set[str] = set()
        self.sums: dict[str, str] = {}
        self.last = ""
        self.given = 0
        self.error: Exception | None = None
        """Why there are no more tensors."""

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, spec.dtype, tuple(spec.shape)) for name, spec in self.specs.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        tensors = iter(self.tensors)
        while True:
            try:
                name, tensor = next(tensors)
            except StopIteration:
                return
            except Exception as error:
                self.error = error
                raise
            self.last, self.given = name, self.given + 1
            sent = tensor.detach().to(device)
            if name in self.sampled:
                self.sums[name] = checksum(sent)
            yield name, sent


class Sender:
    """Sends the first rank's tensors into engines.

    Args:
        transport: how.
        buffer: bytes of tensors that are packed together.
        timeout: seconds that a transfer, or the making of a group, may take.
    """

    def __init__(self, transport: Literal["nccl", "ipc"], buffer: int, timeout: float) -> None:
        self.transport, self.buffer, self.timeout = transport, buffer, timeout
        self._source = Source()
        self._joined: list[tuple[str, int]] = []
        self._engine: TrainerWeightTransferEngine[Any] | None = None
        self._fan_out: FanOut | None = None

    def send(
        self,
        recipients: Sequence[Recipient],
        tensors: Iterable[tuple[str, torch.Tensor]],
        specs: Mapping[str, Described],
        version: int,
    ) -> None:
        """Give engines new weights, and let them go on.

        Args:
            recipients: the engines.
            tensors: what `specs` says, in this order.
            specs: name -> shape and dtype.
            version: what the engines call them.

        Raises:
            TransferError: they have not arrived everywhere. No engine has been let go.
            Exception: what the iteration of `tensors` raises.
        """
        source = self._source
        source.specs, source.tensors, source.last, source.given, source.error = specs, tensors, "", 0, None
        source.sampled, source.sums = set(sampled(list(specs), version)), {}
        try:
            fan_out = self._join(recipients)
            fan_out.version, fan_out.sampled, fan_out.sums = version, sorted(source.sampled), source.sums
            self._in_time(self._send, "was not over")
            fan_out.let_go()
        except (EngineError, RuntimeError, ValueError, OSError) as error:
            raise source.error or self._explained(error, version) from error
        finally:
            source.tensors = ()

    def close(self) -> None:
        """Leave the engines."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine, self._joined = None, []

    def _send(self) -> None:
        if self._engine is None:
            raise RuntimeError("there are no engines to send to")
        if isinstance(self._engine, IpcFromFirstRank):  # which refuses a tensor that does not fit
            largest = max(spec.nbytes for spec in self._source.specs.values())
            self._engine.packed_buffer_size_bytes = max(self.buffer, largest)
        self._engine.send_weights()

    def _join(self, recipients: Sequence[Recipient]) -> FanOut:
        """The engines, in one group with this process; as it is, if they are those of the push before."""
        joined = [(recipient.name, recipient.life) for recipient in recipients]
        if self._fan_out is not None and joined == self._joined:
            return self._fan_out
        self.close()
        ends = list(accumulate(map(_workers, recipients), initial=1))
        ranks = [range(start, end) for start, end in pairwise(ends)]
        self._fan_out = fan_out = FanOut(recipients, ranks, self.transport)
        met: list[TrainerWeightTransferEngine[Any]] = []  # one that comes after the deadline is not ours

        def meet() -> None:
            if self.transport == "ipc":
                ipc = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=self.buffer)
                met.append(IpcFromFirstRank.trainer_init(ipc, client=fan_out, source=self._source))
                return
            address, port = meeting_place([recipient.client.server.url for recipient in recipients])
            nccl = NCCLTrainerInitInfo(
                rank=0,
                master_address=address,
                master_port=port,
                world_size=ends[-1],
                packed_buffer_size_bytes=self.buffer,
            )
            met.append(NCCLTrainerWeightTransferEngine.trainer_init(nccl, client=fan_out, source=self._source))

        self._in_time(meet, "was not joined by all")
        self._engine, self._joined = met[0], joined
        return fan_out

    def _in_time(self, act: Callable[[], None], late: str) -> None:
        """Do what may wait for ever on a GPU: until the deadline, or until an engine fails.

        Raises:
            TransferError: one of these has come first.
        """
        outcomes: SimpleQueue[Exception | None] = SimpleQueue()
        if self._fan_out:
            self._fan_out.failed = outcomes.put
        device = torch.accelerator.current_device_index() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # each thread has its own
                    torch.cuda.synchronize()  # vLLM packs on streams that do not wait for the optimizer's last kernels
                act()
            except Exception as error:
                outcomes.put(error)
            else:
                outcomes.put(None)

        thread = threading.Thread(target=run, name=f"weights by {self.transport}", daemon=True)
        thread.start()
        try:
            outcome, in_time = outcomes.get(timeout=self.timeout), True
        except Empty:
            late = f"it {late} after rollout.transfer_timeout = {self.timeout:g} s"
            outcome, in_time = TransferError(late), False
        if outcome is None:
            return
        error = outcome if isinstance(outcome, TransferError) else TransferError(str(outcome) or repr(outcome))
        if self._fan_out and (self._fan_out.together or not in_time):
            self._blame(error)
        self.close()  # ends what the thread waits for, so that the tensors can be used again
        thread.join(ENDING_SECONDS)
        raise error from outcome

    def _blame(self, error: TransferError) -> None:
        """Engines that have not answered are lost: they hang, or wait for others, and only a new start frees them."""
        for name in sorted(self._fan_out.waiting) if self._fan_out else ():
            error.engines.setdefault(name, EngineLostError(f"{name} waits in a transfer that is broken off"))

    def _explained(self, error: Exception, version: int) -> TransferError:
        source, total = self._source, len(self._source.specs)
        faults = error.engines if isinstance(error, TransferError) else {}
        fan_out, self._fan_out = self._fan_out, None
        self.close()
        named = [fan_out.workers(name) for name in faults] if fan_out else list(faults)
        if fan_out:
            fan_out.abandon([name for name, fault in faults.items() if isinstance(fault, EngineLostError)])
        told = f"; {', '.join(named)} at fault" if named else ""
        at = f", the last one {source.last}" if source.last else ""
        what = f"weights {version} by {self.transport}: rank 0 had given {source.given} of {total} tensors{at}{told}: "
        return TransferError(what + (str(error) or repr(error)), faults)


def _workers(recipient: Recipient) -> int:
    try:
        return recipient.client.workers()
    except EngineError as error:
        raise TransferError(str(error), {recipient.name: error}) from error


def meeting_place(urls: Sequence[str]) -> tuple[str, int]:
    """Address of this machine that all engines can reach, and a free port there."""
    found = [_towards(url) for url in urls]
    address = next((one for one in found if not one.startswith("127.") and one != "::1"), found[0])
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])


def _towards(url: str) -> str:
    """This machine's address on the way to a server. Nothing is sent."""
    parts = urlsplit(url)
    family, kind, protocol, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])
