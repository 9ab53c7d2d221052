"""A safetensors file in this machine's memory, written again and again with other values.

The process keeps it mapped: copying into memory that is mapped takes as long as any copy, `write` three times as long,
and into memory that is new six times. It has no name: whatever happens to the process, its memory is free when that is
gone.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Layout, Spec
from megatron_r1.rollout.checksum import KEY, VERSION, Summed, checksum
from megatron_r1.weight_sync.named_tensors import NamedTensors

_UNKNOWN = checksum(torch.empty(0))
"""As long as any."""
_LARGEST = 2**63
"""Version; as long as any."""


class MappedFile:
    """Has all of its memory from the first on.

    Args:
        folder: a file system in memory or, where that has no room, any.
        specs: every tensor that it will hold.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec]) -> None:
        self.specs = dict(specs)
        self._layout = Layout(specs)
        self._header_bytes = len(self._header(dict.fromkeys(specs, _UNKNOWN), _LARGEST))
        size = self._header_bytes + self._layout.size
        self._descriptor, name = tempfile.mkstemp(prefix="megatron_r1-", dir=folder)
        try:
            Path(name).unlink()
            # Else writing to a page that cannot be had would kill the process.
            os.posix_fallocate(self._descriptor, 0, size)
            self._memory = mmap.mmap(self._descriptor, size)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._places = self._of_all()

    @property
    def path(self) -> Path:
        """For every process of this user on this machine."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def write(self, tensors: NamedTensors, version: int) -> None:
        """Each tensor when it is there, then the checksums of what stands in the file.

        Args:
            tensors: as `specs` says, on any device.
            version: of the weights.

        Raises:
            DataError: a tensor is not as `specs` says, or is not given.
        """
        sums = {}
        for name, tensor in tensors:
            spec = self.specs.get(name)
            if spec is None or tensor.dtype != spec.dtype or tensor.shape != spec.shape:
                raise DataError(f"{name} is {tensor.dtype} {list(tensor.shape)}, but {spec} was announced")
            place = self._places[name]
            place.tensor.copy_(tensor.detach())
            sums[name] = place.checksum()
        if missing := [name for name in self.specs if name not in sums]:
            raise DataError(f"{len(missing)} of the weights were announced and are not there, for example {missing[0]}")
        text = self._header(sums, version)[8:].ljust(self._header_bytes - 8)
        self._memory[: self._header_bytes] = len(text).to_bytes(8, "little") + text

    def close(self) -> None:
        """Free the memory, once all who read the file are gone."""
        self._places.clear()  # memory that tensors stand in cannot be closed
        self._memory.close()
        os.close(self._descriptor)

    def _header(self, sums: Mapping[str, str], version: int) -> bytes:
        return self._layout.header({KEY: json.dumps(sums), VERSION: str(version)})

    def _of_all(self) -> dict[str, Summed]:
        """Where each tensor stands."""
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)[self._header_bytes :]
        places = {}
        for name, spec in self.specs.items():
            start = self._layout.offsets[name]
            places[name] = Summed(whole[start : start + spec.nbytes].view(spec.dtype).view(spec.shape))
        return places
