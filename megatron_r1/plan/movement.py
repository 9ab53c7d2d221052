"""Bytes that move outside of a training step: weights to the engines, checkpoints, and what is read at the start."""

from dataclasses import dataclass

from megatron_r1.plan.hardware import Hardware
from megatron_r1.wording import counted


@dataclass(frozen=True)
class Transfer:
    """Something that is moved."""

    bytes: float
    seconds: float
    how: str
    host: float = 0.0
    """Bytes in the memory of the node that sends."""


def weight_sync(size: float, hardware: Hardware, one_sender: bool = True) -> Transfer:
    """Weights from the trainer into all engines, from GPU to GPU.

    Args:
        size: bytes of the model as it is sent.
        hardware: where.
        one_sender: the first rank sends all, through its one port; else each node its share.
    """
    if one_sender:
        return Transfer(size, size / hardware.network, "from the first rank through one port: a broadcast's floor")
    return Transfer(size, size / (hardware.network * hardware.gpus_per_node), "by a node's ports together")


def within_gpu(size: float, hardware: Hardware) -> Transfer:
    """Weights into an engine on the first rank's GPU, by CUDA IPC: into the shared buffer, out of it, into place."""
    return Transfer(size, 3 * 2 * size / hardware.memory_rate, "within the GPU: three copies, each read and written")


_FILES = 2
"""In shared memory, which take turns (weight_sync/shared_memory.py)."""


def weights_file(size: float, engine_gpus: int, shared: bool, hardware: Hardware) -> Transfer:
    """The same through a file that the first rank writes and the engines read.

    Args:
        size: bytes of the model as it is sent.
        engine_gpus: of an engine, whose nodes read their shares.
        shared: in shared memory; else on storage.
        hardware: where.
    """
    copied = size / hardware.host_link
    if shared:
        return Transfer(size, 2 * copied, "into shared memory, from there to the engines", _FILES * size)
    nodes = max(1.0, engine_gpus / hardware.gpus_per_node)
    seconds = copied + size / hardware.storage * (1 + 1 / nodes)
    return Transfer(size, seconds, f"to storage by the first node, from there by an engine's {nodes:g}", size)


def checkpoint(parameters: float, state: float, nodes: int, hardware: Hardware) -> Transfer:
    """Weights and optimizer, written by all nodes at once.

    Args:
        parameters: of the model.
        state: bytes kept of each: weight, copy and moments.
        nodes: that write.
        hardware: where.
    """
    size = parameters * state
    return Transfer(
        size, size / (nodes * hardware.storage), f"by {counted(nodes, 'node')} at {hardware.storage / 1e9:g} GB/s each"
    )
