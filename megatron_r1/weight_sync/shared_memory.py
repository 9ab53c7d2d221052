"""Weights from the trainer into running engines on the same machine, through files in shared memory.

The engines map the file, so its bytes are written once and read in place by all of them. It works for any device;
between GPUs, NCCL or CUDA IPC saves the way through the host. The file holds a checksum of each tensor as it is in the
trainer's memory, and an engine refuses what differs.

Two files take turns, so that the one before is whole while the other is written. They have no name: whatever happens to
the trainer, their memory is free when it is gone. And they are kept: writing to memory that is there takes a third of
the time of getting it from the system anew.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_r1.errors import DataError, EngineError
from megatron_r1.rollout.engine import Engine
from megatron_r1.weight_sync.weights_file import on_host, size, write

SHARED_MEMORY = Path("/dev/shm")
_FILES = 2


class SharedMemorySync:
    """See `WeightSync`.

    Args:
        engine: what takes the weights.
        fallback: folder for the files when shared memory is too small, on the engines' machine.
        directory: where they are tried first.
    """

    transport = "shared_memory"

    def __init__(self, engine: Engine, fallback: Path, directory: Path = SHARED_MEMORY) -> None:
        self.engine = engine
        self.fallback = fallback
        self.directory = directory
        self._files: list[int] = []
        self._room = self._pushes = 0

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> float:
        started = time.perf_counter()
        tensors = on_host(named_tensors)
        if (needed := size(tensors)) > self._room:
            self.close()
            folder = self._folder(needed)
            self._files, self._room = [_nameless(folder) for _ in range(_FILES)], needed
        # A path to the open file, for every process of this user on this machine.
        path = Path(f"/proc/{os.getpid()}/fd/{self._files[self._pushes % _FILES]}")
        self._pushes += 1
        try:
            write(path, tensors, version, reuse=True)
        except DataError as error:
            raise EngineError(f"cannot write the weights for the engines: {error}") from error
        self.engine.update_weights(path, version)
        return time.perf_counter() - started

    def close(self) -> None:
        """Free the memory, once the engines are gone."""
        for file in self._files:
            os.close(file)
        self._files, self._room = [], 0

    def _folder(self, nbytes: int) -> Path:
        """The first folder with room for both files and half as much again in reserve."""
        self.fallback.mkdir(parents=True, exist_ok=True)
        needed = 3 * nbytes
        for folder in (self.directory, self.fallback):
            if folder.is_dir() and shutil.disk_usage(folder).free > needed:
                return folder
        raise EngineError(
            f"the weights ({nbytes / 2**30:.2f} GiB) need three times their size free in {self.directory} or "
            f"{self.fallback}"
        )


def _nameless(folder: Path) -> int:
    """An open file that is gone when it is closed, of which other processes of this user may write and read."""
    descriptor, name = tempfile.mkstemp(prefix="megatron_r1-", dir=folder)
    Path(name).unlink()
    return descriptor
