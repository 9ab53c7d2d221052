"""vLLM's engines for NCCL and CUDA IPC on a CPU: gloo in the place of NCCL, mapped files in that of GPU memory.

Everything else is vLLM's own: rendezvous, ranks, packing, buffers, handles over HTTP, loading. A vLLM server has the
stand-ins with `--worker-extension-cls=tests.rollout.on_cpu_worker.Receiver`, the trainer with `install(patch.setattr)`.
A file `<FAULTS>/<rank>` (`{"kind": ..., "after": broadcasts}`) breaks what a rank receives, once.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo
from torch.multiprocessing import reductions
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, nccl_engine, packed_tensor

FAULTS = "MEGATRON_R1_TEST_FAULTS"
"""Environment variable with a folder."""
POLL_SECONDS = 0.002
_mapped: dict[int, str] = {}


class Gloo:
    """In the place of `PyNcclCommunicator`: a broadcast ends when all have it, or when the group is destroyed."""

    def __init__(self, group: Any, device: object) -> None:
        self.rank, self.device = group.rank, device
        store = PrefixStore("tensors", group.store)
        self._group = ProcessGroupGloo(store, group.rank, group.world_size, timedelta(minutes=10))
        self._destroyed = False
        self._broadcasts = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        fault = self._fault() if self.rank != src else {}
        if fault.get("kind") == "die":
            os._exit(1)
        if fault.get("kind") == "hang":
            time.sleep(600)
        work = self._group.broadcast([tensor], options)
        while not work.is_completed():
            if self._destroyed:
                raise RuntimeError("the group is destroyed")
            time.sleep(POLL_SECONDS)
        work.wait()
        if fault.get("kind") == "flip":
            tensor.view(-1).view(torch.uint8)[-1] ^= 1
        self._broadcasts += 1

    def destroy(self) -> None:
        self._destroyed = True

    def _fault(self) -> dict[str, Any]:
        file = Path(os.environ.get(FAULTS, "/nowhere")) / str(self.rank)
        fault: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if not fault or fault["after"] != self._broadcasts:
            return {}
        file.unlink()
        return fault


def empty(*shape: Any, device: object = None, **options: Any) -> torch.Tensor:
    """As `torch.empty`; memory of "cuda" is a file that other processes can map."""
    if device != "cuda":
        return torch.empty(*shape, device=device, **options)
    handle, path = tempfile.mkstemp(dir="/dev/shm", prefix="on_cpu-")
    os.truncate(handle, *shape)
    os.close(handle)
    made = torch.from_file(path, shared=True, size=shape[0], dtype=options["dtype"])
    _mapped[made.data_ptr()] = path
    return made


def reduce_tensor(tensor: torch.Tensor) -> tuple[None, tuple[Any, ...]]:
    """As torch's of CUDA: what another process needs to see the same memory, its device at place 6."""
    return None, (_mapped[tensor.data_ptr()], tensor.numel(), 0, 0, 0, 0, None)


def rebuild_cuda_tensor(path: str, size: int, *_: object) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class Torch:
    """torch with a device called "cuda"."""

    empty = staticmethod(empty)
    cuda = SimpleNamespace(
        Stream=lambda device: SimpleNamespace(synchronize=lambda: None),
        stream=lambda _: nullcontext(),
        current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
        is_available=lambda: False,
        get_device_properties=lambda _: SimpleNamespace(uuid="the only one"),
        ipc_collect=lambda: None,
        synchronize=lambda: None,
    )
    accelerator = SimpleNamespace(current_device_index=lambda: 0, current_accelerator=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install(set_: Callable[[object, str, object], None]) -> None:
    """Put the stand-ins in place."""
    stand_in = Torch()
    for module in (nccl_common, nccl_engine, ipc_engine, packed_tensor):
        set_(module, "torch", stand_in)
    set_(packed_tensor, "reduce_tensor", reduce_tensor)
    set_(reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    set_(pynccl, "PyNcclCommunicator", Gloo)
