"""vLLM's sender by CUDA IPC, for a learner whose first rank sends all, out of memory that other processes can open."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from vllm.device_allocator.alloc_conf import EXPANDABLE_SEGMENTS, conf_flag_enabled, with_conf_flag
from vllm.distributed.weight_transfer.base import WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine


class IpcFromFirstRank(IPCTrainerWeightTransferEngine):
    """The original has each rank of the learner send to the engine on its GPU; here the first sends all, alone."""

    def _all_gather_and_merge_handles(self, handles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return handles

    @staticmethod
    def _post_send_sync() -> None:
        torch.cuda.ipc_collect()

    def _send_packed(self, source: WeightSource) -> None:
        """The original makes its buffer before it asks for the first tensor: the tensors' own memory is as ever."""
        with ExitStack() as buffer:
            buffer.enter_context(openable_memory())

            def tensors() -> Iterator[tuple[str, torch.Tensor]]:
                buffer.close()
                yield from source

            super()._send_packed(tensors())  # which only iterates over it


@contextmanager
def openable_memory() -> Iterator[None]:
    """Within, memory of this process is got from CUDA in whole segments, whose handles any process may open.

    An expandable segment travels as a file descriptor that the receiver takes from this process (`pidfd_getfd`), which
    is refused in most containers, and by Ubuntu's default of `ptrace_scope`. Turning the setting off for a while is
    what torch's allocator provides for (CUDACachingAllocator.cpp, `get_free_block`): it then hands out no free part of
    an expandable segment either.
    """
    settings = torch._C._accelerator_getAllocatorSettings()
    if not conf_flag_enabled(settings, EXPANDABLE_SEGMENTS):
        yield
        return
    # All of them, because torch resets those that it is not told.
    torch._C._accelerator_setAllocatorSettings(with_conf_flag(settings, EXPANDABLE_SEGMENTS, False))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)
