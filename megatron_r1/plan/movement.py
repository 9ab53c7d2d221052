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


def through_memory(size: float, hardware: Hardware) -> Transfer:
    """The same through files in the first node's shared memory, which the first rank writes; `size`: bytes."""
    seconds = 2 * size / hardware.host_link
    return Transfer(size, seconds, "into shared memory, from there to the engines", _FILES * size)


def through_storage(size: float, ranks: int, engine_gpus: int, hardware: Hardware) -> Transfer:
    """The same through files on storage, of which each rank of the trainer writes its share.

    Args:
        size: bytes of the model as it is sent.
        ranks: of the trainer.
        engine_gpus: of an engine, whose nodes read their shares.
        hardware: where.
    """
    writing, reading = (max(1.0, gpus / hardware.gpus_per_node) for gpus in (ranks, engine_gpus))
    seconds = size / ranks / hardware.host_link + size / hardware.storage * (1 / writing + 1 / reading)
    how = f"to storage by the trainer's {writing:g} nodes, from there by an engine's {reading:g}"
    return Transfer(size, seconds, how, size / writing)


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
