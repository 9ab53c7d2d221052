"""Whole tensors on one rank from the parts that ranks hold, one tensor at a time: all on the first, or each on one of
those that hold a part of it.

Parts travel in batches of sends and receives, which NCCL does in the communicator of all ranks. One that is sent alone
would have torch open a communicator of its own for the two ranks (`getKeySendRecv` in ProcessGroupNCCL.cpp), and the
first rank would end with as many as there are ranks that send.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1.model.parallel import device
from megatron_r1.model.placement import Block, Share

FIRST = 0


@dataclass(frozen=True, slots=True)
class Sender:
    """A part of a tensor, and who sends it."""

    rank: int
    """The lowest that holds it, unless another is chosen."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    blocks: tuple[Block, ...]
    dtype: torch.dtype
    stage: int
    """Of the pipeline."""
    held_by: tuple[int, ...] = ()
    """All ranks that have it, by number: data-parallel copies, and tensor-parallel ones of what is not cut."""


class Route(NamedTuple):
    """How a tensor is put together."""

    root: int
    """The rank that gets the whole."""
    senders: list[Sender]


def senders(ours: Mapping[str, Share]) -> dict[str, list[Sender]]:
    """Name -> of every part the lowest rank that holds it. All ranks call it together and get the same."""
    rank, stage = dist.get_rank(), parallel_state.get_pipeline_model_parallel_rank()
    mine = {name: Sender(rank, share.shape, share.blocks, share.tensor.dtype, stage) for name, share in ours.items()}
    of_ranks: list[dict[str, Sender]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)  # and NCCL has its communicator of all ranks, if it had none
    found: dict[str, dict[tuple[Block, ...], list[Sender]]] = {}
    for theirs in of_ranks:
        for name, sender in theirs.items():
            found.setdefault(name, {}).setdefault(sender.blocks, []).append(sender)
    return {
        name: [replace(same[0], held_by=tuple(one.rank for one in same)) for same in parts.values()]
        for name, parts in found.items()
    }


def routes(sent_by: Mapping[str, list[Sender]]) -> dict[str, Route]:
    """Each tensor to one of the ranks that hold a part of it: the largest first, to the one that has the least so far.

    The others send what it lacks, of the copies of a part the one with the most leading bits of the root's number: it
    is in the root's own group where groups are runs of 2^n ranks. Every rank that has the same `senders` gets the same.
    """
    load, found = dict.fromkeys(range(dist.get_world_size()), 0), dict[str, Route]()
    for name, parts in sorted(sent_by.items(), key=lambda item: (-math.prod(item[1][0].shape), item[0])):
        root = min({rank for part in parts for rank in part.held_by}, key=lambda rank: (load[rank], rank))
        load[root] += math.prod(parts[0].shape)
        found[name] = Route(root, [replace(part, rank=_nearest(part.held_by, root)) for part in parts])
    return found


def _nearest(ranks: tuple[int, ...], root: int) -> int:
    return min(ranks, key=lambda rank: rank ^ root)


def collected(
    holders: list[Sender], mine: Callable[[], torch.Tensor], dtype: torch.dtype | None, root: int = FIRST
) -> torch.Tensor | None:
    """A whole tensor on one rank, None on the others.

    Beside the whole tensor that rank holds at most the parts of it that are no contiguous piece of it.

    Args:
        holders: of this tensor, from `senders` or `routes`.
        mine: this rank's part; called on those ranks alone that are among the holders.
        dtype: what it is turned into before it travels; None = it stays as it is.
        root: the rank that gets it.
    """
    rank, kept = dist.get_rank(), dtype or holders[0].dtype
    if rank != root:
        if any(sender.rank == rank for sender in holders):
            _batch([dist.P2POp(dist.isend, mine().to(kept).contiguous(), root)])
        return None
    if len(holders) == 1 and holders[0].rank == root:
        return mine().to(kept)
    whole = torch.empty(holders[0].shape, dtype=kept, device=device())
    parts = [mine().to(kept) if sender.rank == root else _landing(whole, sender) for sender in holders]
    _batch([dist.P2POp(dist.irecv, part, sender.rank) for part, sender in zip(parts, holders, strict=True)
            if sender.rank != root])  # fmt: skip
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
