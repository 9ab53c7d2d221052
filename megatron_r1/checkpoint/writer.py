"""One checkpoint on its way to the disk: written by threads of each rank, finished by all ranks together.

Threads of our own and not megatron-core's processes: a fork of a process with gloo's, NCCL's or OpenMP's threads may
wait for ever for a lock that one of them held, writes on after a `kill -9` of the run, and gains nothing, because
writing and hashing release Python's lock.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.manifest import Manifest
from megatron_r1.compat.megatron_checkpoint import SaveStrategy, keep_results_in_process
from megatron_r1.data.files import sync
from megatron_r1.errors import DataError
from megatron_r1.model.parallel import device, from_first_rank

keep_results_in_process()

Describe = Callable[[Path], None]
"""Writes small files into a checkpoint's folder."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_SMALL_FILES = 2**20
"""Bytes that a checkpoint needs besides its tensors, about."""


@dataclass
class _Outcome:
    """What became of one rank's files."""

    manifest: Manifest
    error: str = ""
    """Why they are not whole."""
    code: int = 0
    """The operating system's number of that."""


class Write:
    """The writing of one checkpoint. All ranks make one together.

    Args:
        folder: where to; it is made.
        state: Megatron's sharded state dict.
        background: copy what is written, so that training may go on.
        describe: writes further files into it, on the first rank.

    Raises:
        OSError: the disk is full, or has less room than the checkpoint needs; nothing is left of it.
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, state: dict[str, Any], background: bool, describe: Describe | None = None) -> None:
        self.folder, self._need, self._describe = folder, _bytes_of_all(state), describe
        with self._explained():
            from_first_rank(self._make_room)
            self._request = dist_checkpointing.save(
                state,
                str(folder),
                SaveStrategy(),
                async_sharded_save=True,
                preprocess_common_before_consistancy_check=_compared,
            )
        self._outcome = _Outcome({})
        arguments = self._staged(background)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether this rank still writes."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks, and write what makes their files a checkpoint.

        Raises:
            OSError, DataError: as above, on all ranks.
        """
        self._thread.join()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._outcome)
        outcomes: list[_Outcome] = found
        for outcome in outcomes:
            self._refuse(outcome)
        with self._explained():
            for finalize in self._request.finalize_fns:
                finalize()
            files = {name: entry for part in outcomes for name, entry in part.manifest.items()}
            from_first_rank(lambda: self._seal(files))

    def _staged(self, background: bool) -> tuple[Any, ...]:
        """Arguments of the function that writes, tensors in host memory."""
        request = self._request
        if request.async_fn is None:  # this rank has nothing to write
            return ()
        rank, _, results = request.async_fn_args
        buckets = request.preload_fn()
        if background and device().type == "cpu":  # else they have just been copied
            buckets = [
                (file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
                for file, key, (objects, tensors) in buckets
            ]
        return rank, buckets, results

    def _write(self, *arguments: Any) -> None:
        """In the thread: write and hash this rank's files."""
        try:
            if arguments:
                self._request.async_fn(*arguments)
            names = sorted(path.name for path in self.folder.glob(f"__{dist.get_rank()}_*"))
            self._outcome.manifest = {name: manifest.entry_of(self.folder / name) for name in names}
        except BaseException as error:  # whatever it is, `finish` raises it
            self._outcome = self._outcome_of(error)

    def _make_room(self) -> None:
        """On the first rank."""
        self.folder.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if self._need > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _seal(self, files: Manifest) -> None:
        """On the first rank: add the small files, and write the manifest."""
        if self._describe:
            self._describe(self.folder)
        for path in self.folder.iterdir():
            if path.name not in files:
                sync(path)
                files[path.name] = manifest.entry_of(path)
        manifest.write(self.folder, files)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the operating system refuses in the block is said as `Write` says it."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            outcome = self._outcome_of(error)
            if outcome.code:
                self._refuse(outcome)
            raise

    def _outcome_of(self, error: BaseException) -> _Outcome:
        """An error in words."""
        code, where = _refusal(error)
        if not code:
            return _Outcome({}, f"{self.folder} was not written: {type(error).__name__}: {error}")
        text = f"cannot write {where or self.folder}: {os.strerror(code)}"
        if code in _FULL:
            free = shutil.disk_usage(next(path for path in self.folder.parents if path.exists())).free
            text += f", the checkpoint needs {_in_words(self._need)} and {_in_words(free)} are free"
        return _Outcome({}, f"{text}; the checkpoints before it are untouched", code)

    def _refuse(self, outcome: _Outcome) -> None:
        """Raise what an outcome says, if it is bad, and remove what is half written."""
        if not outcome.error:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        if outcome.code in _FULL:
            raise OSError(errno.ENOSPC, outcome.error)
        raise DataError(outcome.error) if outcome.code else RuntimeError(outcome.error)


def _bytes_of_all(state: dict[str, Any]) -> int:
    """What the ranks will write together."""
    own = torch.tensor(sum(_bytes(state)), device=device())
    dist.all_reduce(own)
    return int(own) + _SMALL_FILES


def _bytes(state: dict[str, Any]) -> Iterator[int]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            tensor = value.data
            yield tensor.nbytes if isinstance(tensor, torch.Tensor) else 0


def _refusal(error: BaseException) -> tuple[int, str]:
    """The operating system's number, and the file that it was about; 0 where it has nothing to do with an error.

    PyTorch's writer raises errors of its own: they have the system's as their context, or only quote it.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return cause.errno or errno.EIO, cause.filename or ""
    return next((code for code in (*_FULL, errno.EROFS, errno.EIO) if os.strerror(code) in str(error)), 0), ""


def _in_words(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"


def _compared(common: dict[str, Any]) -> dict[str, Any]:
    """What Megatron has all ranks compare: not the figures, as the first rank may have whole rollouts among them."""
    return {key: value for key, value in common.items() if key != "figures"}
