"""Weights from the trainer into running engines on the same machine, through a file in shared memory.

The engines map the file, so its bytes are written once and read in place by all of them. It works for any device;
between GPUs, NCCL or CUDA IPC saves the way through the host.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engine import Engine

SHARED_MEMORY = Path("/dev/shm")


class SharedMemorySync:
    """Pushes the policy's weights into an engine.

    Args:
        engine: what takes the weights.
        fallback: folder for the file when shared memory is too small, on the engines' machine.
        directory: where the file is tried first.
    """

    def __init__(self, engine: Engine, fallback: Path, directory: Path = SHARED_MEMORY) -> None:
        self.engine = engine
        self.fallback = fallback
        self.directory = directory

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> float:
        """Replace the engine's weights in place; from here on its responses carry `version`.

        Args:
            named_tensors: the whole model under its Hugging Face names, in the engine's dtype.
            version: the trainer's step.

        Returns:
            Seconds it took.

        Raises:
            EngineError: no room for the file, or the engine failed (see `Engine.update_weights`).
        """
        started = time.perf_counter()
        tensors = _without_overlap(named_tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        path = self._folder(size) / f"megatron_r1-{os.getpid()}-{version}.safetensors"
        try:
            save_file(tensors, path)
            self.engine.update_weights(path, version)
        finally:
            path.unlink(missing_ok=True)
        return time.perf_counter() - started

    def _folder(self, size: int) -> Path:
        """The first folder with room for `size` bytes and as much again in reserve."""
        self.fallback.mkdir(parents=True, exist_ok=True)
        for folder in (self.directory, self.fallback):
            if folder.is_dir() and shutil.disk_usage(folder).free > 2 * size:
                return folder
        raise EngineError(
            f"the weights ({size / 2**30:.2f} GiB) need twice their size free in {self.directory} or {self.fallback}"
        )


def _without_overlap(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """On the host; only a tensor that is there twice (tied copies) is cloned, because safetensors refuses overlaps."""
    tensors: dict[str, torch.Tensor] = {}
    starts: set[int] = set()
    for name, tensor in named_tensors:
        host = tensor.detach().cpu().contiguous()
        tensors[name] = host.clone() if host.data_ptr() in starts else host
        starts.add(host.data_ptr())
    return tensors
