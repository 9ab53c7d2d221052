"""Weights from the trainer into engines on other machines, through files on a file system that all of them see.

Every rank of the learner writes the tensors that it puts together (`model/collect.py`) into a file of its own, all in
one folder with Hugging Face's index: neither the first rank nor its node's way to the storage carries the whole model.
"""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_r1.errors import DataError, EngineError
from megatron_r1.model.hf_folder import exchange, write_index
from megatron_r1.model.parallel import from_every_rank, from_first_rank, is_first_rank
from megatron_r1.rollout.checksum import KEY, VERSION, checksum_of_all
from megatron_r1.rollout.engine import Engine
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.weights_file import on_host, size, write

_NAME = "weights-{}"


class Written(NamedTuple):
    """What one rank has written."""

    file: str
    sums: dict[str, str]
    """Checksum of each tensor."""
    nbytes: int


class DiskSync:
    """See `WeightSync`; all ranks have one. The newest folder stays until the next one is loaded, for engines that come
    back.

    Args:
        engine: what takes the weights; on the first rank.
        folder: where the weights go; those of an earlier run in it are removed.
    """

    transport = "disk"

    def __init__(self, engine: Engine | None, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        if engine:
            folder.mkdir(parents=True, exist_ok=True)

    def push(self, tensors: NamedTensors, version: int) -> float:
        """All ranks call it together, each with its own tensors; an error of one is raised on all."""
        started = time.perf_counter()
        aside = from_first_rank(partial(self._begin, tensors.nbytes, version))
        try:
            parts = from_every_rank(partial(self._write, aside, tensors, version))
            folder = from_first_rank(partial(self._finish, aside, parts, tensors, version))
        except Exception:
            if is_first_rank():  # nobody writes to it any more
                shutil.rmtree(aside, ignore_errors=True)
            raise
        from_first_rank(partial(self._load, folder, version))
        return time.perf_counter() - started

    def close(self) -> None:
        """The newest folder stays: engines at addresses outlive the run."""

    def _begin(self, nbytes: int, version: int) -> Path:
        """An empty folder of a name that no node has looked for: what stood under one is remembered for a while."""
        aside = self.folder / f"{_NAME.format(version)}.{time.time_ns()}.partial"
        try:
            if shutil.disk_usage(self.folder).free < nbytes:
                raise DataError(f"{nbytes / 2**30:.2f} GiB are more than is free in {self.folder}")
            aside.mkdir()
        except (DataError, OSError) as error:
            raise _failed(error) from error
        return aside

    def _write(self, aside: Path, tensors: NamedTensors, version: int) -> Written:
        """This rank's file, if there is something for it."""
        rank = dist.get_rank()
        path = aside / f"rank-{rank:05d}.safetensors"
        try:
            mine = on_host(tensors)
        finally:
            tensors.drain()
        try:
            return Written(path.name, write(path, mine, version) if mine else {}, size(mine))
        except (DataError, OSError) as error:
            raise _failed(error, rank) from error

    def _finish(self, aside: Path, parts: list[Written], tensors: NamedTensors, version: int) -> Path:
        """The folder, whole and under its name."""
        sums = {name: value for part in parts for name, value in part.sums.items()}
        files = {name: part.file for part in parts for name in part.sums}
        folder = self.folder / _NAME.format(version)
        try:
            for rank, part in enumerate(parts):
                if part.sums and not (aside / part.file).exists():
                    raise DataError(
                        f"rank {rank} has written {part.file}, which the first rank does not see in {aside}: give the "
                        "run an `output` on a file system that all nodes share"
                    )
            if missing := tensors.specs.keys() - sums:
                raise DataError(f"{len(missing)} of the tensors are no rank's, for example {min(missing)}")
            said = {VERSION: str(version), KEY: checksum_of_all(sums)}
            write_index(aside, files, sum(part.nbytes for part in parts), said)
            exchange(aside, folder, folder.with_name(f"{folder.name}.old"))
        except (DataError, OSError) as error:
            raise _failed(error) from error
        return folder.resolve()

    def _load(self, folder: Path, version: int) -> None:
        if self.engine:
            self.engine.update_weights(folder, version)
        for older in self.folder.glob(_NAME.format("*")):
            if older.name != folder.name:  # a file system may refuse while an engine still has a file open
                shutil.rmtree(older, ignore_errors=True)


def _failed(error: Exception, rank: int | None = None) -> EngineError:
    where = "" if rank is None else f" on rank {rank}"
    return EngineError(f"cannot write the weights for the engines{where}: {error}")
