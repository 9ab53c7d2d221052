"""Context parallelism: which tokens of a sequence a rank holds, and whole sequences from the parts of all ranks.

A sequence is cut into twice as many chunks as there are ranks, and rank r of n holds chunks r and 2n - 1 - r, so that
all have as much causal attention to compute (Llama 3, arXiv 2407.21783, 3.3.2). Packed sequences are cut one by one, as
Megatron's rotary embedding expects.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def size() -> int:
    """Ranks that share a sequence."""
    count: int = parallel_state.get_context_parallel_world_size()
    return count


def positions(ends: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """Positions in the whole row that a rank holds, in its order. [tokens / ranks]

    Args:
        ends: where each sequence of the row ends, 0 first; their lengths divide by twice the number of ranks.
        rank: in the context-parallel group; None = this one.
    """
    rank = parallel_state.get_context_parallel_rank() if rank is None else rank
    chunks = 2 * size()
    pieces = []
    for start, end in pairwise(ends.tolist()):
        length = (end - start) // chunks
        pieces += [torch.arange(start + n * length, start + (n + 1) * length) for n in (rank, chunks - 1 - rank)]
    return torch.cat(pieces).to(ends.device)


def whole(part: torch.Tensor, ends: torch.Tensor, dim: int, summed: bool) -> torch.Tensor:
    """The row that the ranks hold parts of, in its own order; differentiable.

    Args:
        part: this rank's, in the order of `positions`.
        ends: as for `positions`.
        dim: along which the tokens stand.
        summed: whether each rank computes something else with the row, so that gradients are summed over them; else
            all compute the same, and the gradient is this rank's own.
    """
    if size() == 1:
        return part
    row: torch.Tensor = _Whole.apply(part, ends, dim, summed)
    return row


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, ends: torch.Tensor, dim: int, summed: bool) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        order = torch.cat([positions(ends, rank) for rank in range(size())])
        ctx.ends, ctx.dim, ctx.summed = ends, dim, summed
        return torch.cat(parts, dim).index_select(dim, order.argsort())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.summed:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
        return grad.index_select(ctx.dim, positions(ctx.ends)), None, None, None
