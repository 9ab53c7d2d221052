"""How the policy's weights reach the engines: one interface, and which transport a run has."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.config.sections import RolloutSection
from megatron_r1.rollout.engine import Engine
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.shared_memory import SharedMemorySync


class WeightSync(Protocol):
    """Pushes the policy's weights into engines."""

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> float:
        """Replace the engines' weights in place; from here on their responses carry `version`.

        Args:
            named_tensors: the whole model under its Hugging Face names, in the engines' dtype.
            version: the trainer's step.

        Returns:
            Seconds it took.

        Raises:
            EngineError: no room for the weights, or an engine failed (see `Engine.update_weights`).
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def open_sync(section: RolloutSection, engine: Engine, folder: Path) -> WeightSync:
    """The transport of a run.

    Args:
        section: the run file's [rollout].
        engine: what takes the weights.
        folder: of the run, on a file system that all engines see where these are on other machines.
    """
    if section.transport == "disk" or not section.on_this_machine:
        return DiskSync(engine, folder)
    return SharedMemorySync(engine, fallback=folder)
