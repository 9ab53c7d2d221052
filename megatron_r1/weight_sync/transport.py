"""How the policy's weights reach the engines: one interface, which transport a run has, and what it says of a push."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.parallel import consumed_by_first_rank
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.member import Member
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync

MIB = 2**20


class WeightSync(Protocol):
    """Pushes the policy's weights into engines."""

    transport: str
    """As a run file calls it."""

    def push(self, tensors: NamedTensors, version: int) -> float:
        """Replace the engines' weights in place; from here on their responses carry `version`.

        Args:
            tensors: the whole model under its Hugging Face names, in the engines' dtype.
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


def open_sync(section: RolloutSection, engine: TakesWeights, folder: Path) -> WeightSync:
    """The transport of a run.

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

    @property
    def seconds(self) -> float:
        """Of a push, if each byte takes as long as those that were tried. Few bytes make this too much."""
        return self.tried_seconds * max(1.0, self.bytes / self.tried_bytes)

    def __str__(self) -> str:
        return (
            f"weights reach the engines by {self.transport}: {self.tensors:,} tensors, {self.bytes / MIB:,.1f} MiB a "
            f"push, at most about {self.seconds:.2g} s ({len(self.tried)} of them, from every pipeline stage, "
            f"{self.tried_bytes / MIB:,.2f} MiB, took {self.tried_seconds:.2g} s)"
        )


class Exported(Protocol):
    """A model's tensors, collected anew each time that all ranks iterate it (`Export`)."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def specs(self) -> Mapping[str, Spec]:
        """What it gives."""
        ...

    def of_each_stage(self) -> "Exported":
        """A few of them, from every rank's kind."""
        ...


def preflight(push: Callable[[NamedTensors], float], export: Exported, transport: str) -> PushPlan:
    """Send a few tensors of every pipeline stage alone, twice: the first makes connections, the second is timed.

    Engines have no usable weights afterwards, until the next push. All ranks call it together and get the same.

    Args:
        push: `WeightSync.push` as version `PREFLIGHT`; called on the first rank.
        export: what will be pushed.
        transport: by which.

    Raises:
        EngineError: as `WeightSync.push`.
    """
    few = export.of_each_stage()
    whole, specs, seconds = NamedTensors((), export.specs()), few.specs(), 0.0
    for _ in range(2):
        seconds = consumed_by_first_rank(lambda tensors: push(NamedTensors(tensors, specs)), few)
    tried = sum(spec.nbytes for spec in specs.values())
    return PushPlan(len(whole.specs), whole.nbytes, transport, tuple(specs), tried, seconds)
