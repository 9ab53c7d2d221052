"""Weights from the trainer into engines on other machines, through a file on a file system that all of them see."""

import contextlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_r1.errors import DataError, EngineError
from megatron_r1.rollout.engine import Engine
from megatron_r1.weight_sync.weights_file import on_host, size, write

_NAME = "weights-{}.safetensors"


class DiskSync:
    """See `WeightSync`. The newest file stays until the next one is loaded, for engines that come back.

    Args:
        engine: what takes the weights.
        folder: where the files go; those of an earlier run in it are removed.
    """

    transport = "disk"

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        folder.mkdir(parents=True, exist_ok=True)

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> float:
        started = time.perf_counter()
        tensors = on_host(named_tensors)
        path = self.folder / _NAME.format(version)
        aside = path.with_suffix(".partial")
        try:
            if shutil.disk_usage(self.folder).free < size(tensors):
                raise DataError(f"{size(tensors) / 2**30:.2f} GiB are more than is free in {self.folder}")
            write(aside, tensors, version)
            aside.replace(path)
        except (DataError, OSError) as error:
            aside.unlink(missing_ok=True)
            raise EngineError(f"cannot write the weights for the engines: {error}") from error
        self.engine.update_weights(path.resolve(), version)
        for older in self.folder.glob(_NAME.format("*")):
            if older != path:
                with contextlib.suppress(OSError):  # a file system may refuse while an engine still has it open
                    older.unlink()
        return time.perf_counter() - started

    def close(self) -> None:
        """The newest file stays: engines at addresses outlive the run."""
