"""How the policy's weights reach the engines: one interface, which transport a run has, and what it says of a push."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.parallel import consumed_by_first_rank
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.member import Member
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync

T = TypeVar("T")
MIB = 2**20
SPREAD = ("disk",)
"""Transports that send from every rank; of the others the first rank is the one sender."""


class WeightSync(Protocol):
    """Pushes the policy's weights into engines."""

    transport: str
    """As a run file calls it."""

    def push(self, tensors: NamedTensors, version: int) -> float:
        """Replace the engines' weights in place; from here on their responses carry `version`.

        Args:
            tensors: the whole model under its Hugging Face names, in the engines' dtype; by a transport of `SPREAD`
                this rank's share of it.
            version: the trainer's step.

        Returns:
            Seconds it took.

        Raises:
            TransferError: they have not arrived everywhere; a push of all tensors may be tried again.
            EngineError: no room for the weights, or an engine failed (see `Engine.update_weights`).
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class TakesWeights(Engine, Protocol):
    """An engine that takes them in either way (`Fleet`)."""

    def pass_weights(self, send: Callable[[list[Member]], None], version: int) -> None:
        """See `Fleet.pass_weights`."""
        ...


def join_sync(section: RolloutSection, folder: Path) -> WeightSync | None:
    """What ranks other than the first need for a run's transport, if anything; `folder` as below."""
    return DiskSync(None, folder) if section.chosen_transport in SPREAD else None


def open_sync(section: RolloutSection, engine: TakesWeights, folder: Path) -> WeightSync:
    """The transport of a run, on the first rank.

    Args:
        section: the run file's [rollout].
        engine: what takes the weights.
        folder: of the run, on a file system that all engines see where these are on other machines.

    Raises:
        ConfigError: the trainer and an engine would have one GPU in one NCCL group.
    """
    transport = section.chosen_transport
    if transport == "disk":
        return DiskSync(engine, folder)
    if transport == "shared_memory":
        return SharedMemorySync(engine, fallback=folder)
    if transport == "nccl" and not section.beside_trainer:
        raise ConfigError(
            'rollout.transport = "nccl" needs engines with GPUs of their own: give them some by rollout.first_gpu or '
            'rollout.addresses, or choose "ipc" or "shared_memory"'
        )
    from megatron_r1.weight_sync.direct import DirectSync  # imports vLLM into the trainer: seconds, and only for this

    return DirectSync(engine, transport, section)


def as_it_is(tensors: NamedTensors) -> NamedTensors:
    """What engines hold that do not quantise."""
    return tensors


@dataclass(frozen=True)
class PushPlan:
    """What each push will be."""

    tensors: int
    bytes: int
    transport: str
    tried: tuple[str, ...]
    """Tensors that were sent before the first push."""
    tried_bytes: int
    tried_seconds: float
    ranks: int = 1
    """That send."""

    @property
    def seconds(self) -> float:
        """Of a push, if each byte takes as long as those that were tried. Few bytes make this too much."""
        return self.tried_seconds * max(1.0, self.bytes / self.tried_bytes)

    def __str__(self) -> str:
        senders = f" from {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"weights reach the engines by {self.transport}{senders}: {self.tensors:,} tensors, "
            f"{self.bytes / MIB:,.1f} MiB a push, at most about {self.seconds:.2g} s ({len(self.tried)} of them, from "
            f"every pipeline stage, {self.tried_bytes / MIB:,.2f} MiB, took {self.tried_seconds:.2g} s)"
        )


class Exported(Protocol):
    """A model's tensors, collected anew on the first rank each time that all ranks iterate it (`Export`)."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def specs(self) -> Mapping[str, Spec]:
        """What it gives."""
        ...

    def of_each_stage(self) -> "Exported":
        """A few of them, from every rank's kind."""
        ...

    def spread_out(self) -> "Exported":
        """Each on one of the ranks that hold a part of it, instead."""
        ...


def send(push: Callable[[NamedTensors], T], export: Exported, transport: str) -> T:
    """What a push returns of the tensors that the transport takes from this rank. All ranks call it together.

    Args:
        push: called on all ranks if the transport is of `SPREAD`, else on the first.
        export: what is pushed.
        transport: by which.

    Raises:
        EngineError: as `WeightSync.push`, on all ranks.
    """
    specs = export.specs()
    if transport in SPREAD:
        return push(NamedTensors(export.spread_out(), specs))
    return consumed_by_first_rank(lambda tensors: push(NamedTensors(tensors, specs)), export)


def preflight(
    push: Callable[[NamedTensors], float],
    export: Exported,
    transport: str,
    stored: Callable[[NamedTensors], NamedTensors] = as_it_is,
) -> PushPlan:
    """Send a few tensors of every pipeline stage alone, twice: the first makes connections, the second is timed.

    Engines have no usable weights afterwards, until the next push. All ranks call it together.

    Args:
        push: `WeightSync.push` as version `PREFLIGHT`.
        export: what will be pushed.
        transport: by which.
        stored: what engines are sent of them.

    Raises:
        EngineError: as `WeightSync.push`.
    """
    few, seconds = export.of_each_stage(), 0.0
    for _ in range(2):
        seconds = send(lambda tensors: push(stored(tensors)), few, transport)
    whole, tried = (stored(NamedTensors((), one.specs())) for one in (export, few))
    ranks = dist.get_world_size() if transport in SPREAD else 1
    return PushPlan(len(whole.specs), whole.nbytes, transport, tuple(tried.specs), tried.nbytes, seconds, ranks)
