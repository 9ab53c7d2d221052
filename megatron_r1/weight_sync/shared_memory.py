"""Weights from the trainer into running engines on the same machine, through files in shared memory.

The engines map the file, so its bytes are written once and read in place by all of them. It works for any device;
between GPUs, NCCL or CUDA IPC saves the way through the host. The file holds a checksum of each tensor, and an engine
refuses what differs. Two files take turns, so that the one before is whole while the other is written.
"""

import shutil
import time
from collections import deque
from pathlib import Path

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engine import Engine
from megatron_r1.weight_sync.mapped_file import MappedFile
from megatron_r1.weight_sync.named_tensors import NamedTensors

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
        self._files: deque[MappedFile] = deque()

    def push(self, tensors: NamedTensors, version: int) -> float:
        started = time.perf_counter()
        try:
            if not self._files or self._files[0].specs != tensors.specs:
                self._open(tensors)
            self._files.rotate()
            self._files[0].write(tensors, version)
        except OSError as error:
            self.close()
            raise EngineError(f"cannot write the weights for the engines: {error}") from error
        self.engine.update_weights(self._files[0].path, version)
        return time.perf_counter() - started

    def close(self) -> None:
        """Free the memory, once the engines are gone."""
        while self._files:
            self._files.pop().close()

    def _open(self, tensors: NamedTensors) -> None:
        """In the first folder with room for both files and half as much again in reserve."""
        self.close()
        self.fallback.mkdir(parents=True, exist_ok=True)
        for folder in (self.directory, self.fallback):
            if folder.is_dir() and shutil.disk_usage(folder).free > 3 * tensors.nbytes:
                self._files.extend(MappedFile(folder, tensors.specs) for _ in range(_FILES))
                return
        raise EngineError(
            f"the weights ({tensors.nbytes / 2**30:.2f} GiB) need three times their size free in {self.directory} or "
            f"{self.fallback}"
        )
