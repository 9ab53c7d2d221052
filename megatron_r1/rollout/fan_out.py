"""What vLLM's trainer asks of "the engine", asked of several: a `VLLMWeightSyncClient` over the engines of a fleet."""

import base64
import pickle
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol, TypeVar

from megatron_r1.errors import EngineError
from megatron_r1.report.spans import lane
from megatron_r1.rollout.client import Client

R = TypeVar("R")


class Recipient(Protocol):
    """An engine that takes weights (`Member`)."""

    name: str
    life: int
    client: Client


class TransferError(EngineError):
    """Weights have not arrived everywhere; what has arrived must not answer.

    Args:
        text: what was sent when, and what was wrong.
        engines: what each engine that is at fault said.
    """

    def __init__(self, text: str, engines: dict[str, EngineError] | None = None) -> None:
        super().__init__(text)
        self.engines = engines or {}

    def __reduce__(self) -> tuple[type["TransferError"], tuple[str, dict[str, EngineError]]]:
        return type(self), (str(self), self.engines)


class FanOut:
    """Each call goes to all engines at once, and ends when all have answered.

    Args:
        recipients: the engines.
        ranks: of each engine's workers, in the group of the learner (rank 0) and all workers.
        transport: of `receiver.DIRECT`.
    """

    def __init__(self, recipients: Sequence[Recipient], ranks: Sequence[range], transport: str) -> None:
        self.recipients, self.ranks, self.transport = recipients, ranks, transport
        self.failed: Callable[[TransferError], None] = lambda error: None
        """Is told at once when one engine has failed: the others may then wait for ever."""
        self.version = -1
        """Of the weights that are sent."""
        self.sampled: list[str] = []
        """Tensors whose checksums are compared."""
        self.sums: dict[str, str] = {}
        """Of these, as they were sent."""
        self.waiting: set[str] = set()
        """Engines that have not answered the present call."""
        self.together = False
        """Whether an engine answers this call only when all others do their part of it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine's workers get ranks behind those of the engine before."""

        def connect(recipient: Recipient, ranks: range) -> None:
            place = {"rank_offset": ranks.start} if "rank_offset" in init_info else {}
            recipient.client.connect({"transport": self.transport, "settings": init_info | place})

        self._each(connect, together=True)

    def start_weight_update(self) -> None:
        self._each(lambda recipient, ranks: recipient.client.start_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The fields of vLLM's update info, as they go over HTTP, and which tensors to look at."""
        settings = {name: value for name, value in update_info.items() if value is not None}
        if (handles := settings.pop("ipc_handles", None)) is not None:  # no JSON holds them
            settings["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        sampled = sorted(set(self.sampled) & set(settings["names"]))
        info = {"transport": self.transport, "settings": settings, "sampled": sampled, "version": self.version}
        self._each(lambda recipient, ranks: recipient.client.update(info), together=self.transport == "nccl")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Compare checksums first."""
        self._each(self._compare)
        self._each(lambda recipient, ranks: recipient.client.finish_update(self.version))

    def let_go(self) -> None:
        """The engines go on with these weights."""
        self._each(lambda recipient, ranks: recipient.client.let_go(self.version))

    def abandon(self, lost: Collection[str]) -> None:
        """End an update that has failed, where it is begun; not at those that are lost."""
        for recipient in self.recipients:
            if recipient.name not in lost:
                recipient.client.abandon_update()

    def workers(self, name: str) -> str:
        """The ranks of an engine, for an error."""
        for recipient, ranks in zip(self.recipients, self.ranks, strict=True):
            if recipient.name == name:
                last = f" to {ranks[-1]}" if len(ranks) > 1 else ""
                return f"{name} (rank{'s' if last else ''} {ranks[0]}{last})"
        return name

    def _compare(self, recipient: Recipient, ranks: range) -> None:
        workers = recipient.client.workers(of_one_replica=True)
        said = recipient.client.compare({name: self.sums[name] for name in self.sampled}, ranks.start)
        if said != workers:
            raise EngineError(f"{said} of {workers} workers say that they have compared what they have got")

    def _each(self, act: Callable[[Recipient, range], object], together: bool = False) -> None:
        """Do something with all of them.

        Raises:
            TransferError: it failed with one.
        """

        def noted(recipient: Recipient, ranks: range) -> object:
            with lane(recipient.name):
                return act(recipient, ranks)

        self.together = together
        self.waiting = {recipient.name for recipient in self.recipients}
        with ThreadPoolExecutor(len(self.recipients)) as threads:
            asked = {
                threads.submit(noted, recipient, ranks): recipient.name
                for recipient, ranks in zip(self.recipients, self.ranks, strict=True)
            }
            errors: dict[str, EngineError] = {}
            for done in as_completed(asked):
                self.waiting.discard(asked[done])
                if isinstance(error := done.exception(), EngineError):
                    errors[asked[done]] = error
                    self.failed(TransferError(str(error), dict(errors)))
                elif error:
                    raise error
        if errors:
            raise TransferError(str(next(iter(errors.values()))), errors)
