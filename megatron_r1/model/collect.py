"""Whole tensors on the first rank from the parts that ranks hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

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


def senders(ours: Mapping[str, Share]) -> dict[str, list[Sender]]:
    """Name -> of every part the lowest rank that holds it. All ranks call it together and get the same."""
    mine = {
        name: Sender(dist.get_rank(), share.shape, share.blocks, share.tensor.dtype) for name, share in ours.items()
    }
    of_ranks: list[dict[str, Sender]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    found: dict[str, dict[tuple[Block, ...], Sender]] = {}
    for theirs in of_ranks:
        for name, sender in theirs.items():
            found.setdefault(name, {}).setdefault(sender.blocks, sender)
    return {name: list(parts.values()) for name, parts in found.items()}


def collected(holders: list[Sender], mine: Share | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """A whole tensor on the first rank, None on the others.

    Args:
        holders: of this tensor, from `senders`.
        mine: what this rank holds of it.
        dtype: what it is turned into before it travels; None = it stays as it is.
    """
    rank = dist.get_rank()
    if rank != FIRST:
        if mine is not None and any(sender.rank == rank for sender in holders):
            dist.send(mine.tensor.to(dtype or mine.tensor.dtype).contiguous(), FIRST)
        return None
    if len(holders) == 1 and holders[0].rank == FIRST and mine is not None:
        return mine.tensor.to(dtype or mine.tensor.dtype)
    whole = torch.empty(holders[0].shape, dtype=dtype or holders[0].dtype, device=device())
    for sender in holders:
        part = _part(sender, mine, whole)
        for block in sender.blocks:
            whole[block.box] = part[block.start : block.stop]
    return whole


def _part(sender: Sender, mine: Share | None, whole: torch.Tensor) -> torch.Tensor:
    if sender.rank == FIRST and mine is not None:
        return mine.tensor.to(whole.dtype)
    rows = sender.blocks[-1].stop
    part = whole.new_empty(rows, *sender.blocks[0].shape[1:])
    dist.recv(part, sender.rank)
    return part
