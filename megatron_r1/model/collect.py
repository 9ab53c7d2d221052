"""Whole tensors on the first rank from the parts that ranks hold, one tensor at a time.

Parts travel in batches of sends and receives, which NCCL does in the communicator of all ranks. One that is sent alone
would have torch open a communicator of its own for the two ranks (`getKeySendRecv` in ProcessGroupNCCL.cpp), and the
first rank would end with as many as there are ranks that send.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1.model.parallel import device
from megatron_r1.model.placement import Block, Share

FIRST = 0


@dataclass(frozen=True, slots=True)
class Sender:
    """What the first rank gets of a tensor from one rank."""

    rank: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    blocks: tuple[Block, ...]
    dtype: torch.dtype
    stage: int
    """Of the pipeline."""


def senders(ours: Mapping[str, Share]) -> dict[str, list[Sender]]:
    """Name -> of every part the lowest rank that holds it. All ranks call it together and get the same."""
    rank, stage = dist.get_rank(), parallel_state.get_pipeline_model_parallel_rank()
    mine = {name: Sender(rank, share.shape, share.blocks, share.tensor.dtype, stage) for name, share in ours.items()}
    of_ranks: list[dict[str, Sender]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)  # and NCCL has its communicator of all ranks, if it had none
    found: dict[str, dict[tuple[Block, ...], Sender]] = {}
    for theirs in of_ranks:
        for name, sender in theirs.items():
            found.setdefault(name, {}).setdefault(sender.blocks, sender)
    return {name: list(parts.values()) for name, parts in found.items()}


def collected(
    holders: list[Sender], mine: Callable[[], torch.Tensor], dtype: torch.dtype | None
) -> torch.Tensor | None:
    """A whole tensor on the first rank, None on the others.

    Beside the whole tensor the first rank holds at most the parts of it that are no contiguous piece of it.

    Args:
        holders: of this tensor, from `senders`.
        mine: this rank's part; called on those ranks alone that are among the holders.
        dtype: what it is turned into before it travels; None = it stays as it is.
    """
    rank, kept = dist.get_rank(), dtype or holders[0].dtype
    if rank != FIRST:
        if any(sender.rank == rank for sender in holders):
            _batch([dist.P2POp(dist.isend, mine().to(kept).contiguous(), FIRST)])
        return None
    if len(holders) == 1 and holders[0].rank == FIRST:
        return mine().to(kept)
    whole = torch.empty(holders[0].shape, dtype=kept, device=device())
    parts = [mine().to(kept) if sender.rank == FIRST else _landing(whole, sender) for sender in holders]
    _batch([dist.P2POp(dist.irecv, part, sender.rank) for part, sender in zip(parts, holders, strict=True)
            if sender.rank != FIRST])  # fmt: skip
    for part, sender in zip(parts, holders, strict=True):
        for block in sender.blocks:
            if (place := whole[block.box]).data_ptr() != part.data_ptr():
                place.copy_(part[block.start : block.stop])
    return whole


def _landing(whole: torch.Tensor, sender: Sender) -> torch.Tensor:
    """Where a part is received: in its place, if that is contiguous."""
    if len(sender.blocks) == 1 and (place := whole[sender.blocks[0].box]).is_contiguous():
        return place
    return whole.new_empty(sender.blocks[-1].stop, *sender.blocks[0].shape[1:])


def _batch(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
