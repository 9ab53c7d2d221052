"""Per-token numbers from the ranks that computed them to all ranks, by sample."""

from collections.abc import Container, Sequence

import torch
import torch.distributed as dist

from megatron_r1.train.batch import Minibatch, by_sample


def gather(
    batch: Sequence[Minibatch], values: Sequence[Sequence[torch.Tensor]], wanted: Container[int]
) -> dict[int, list[float]]:
    """Number of each wanted sample -> its numbers, on every rank. [sampled]

    Args:
        batch: this rank's part of every minibatch of a rollout.
        values: one `[selected]` tensor for each of its microbatches.
        wanted: numbers of samples.
    """
    pieces = (piece for parts in zip(batch, values, strict=True) for piece in by_sample(*parts))
    mine = {number: piece.tolist() for number, piece in pieces if number in wanted}
    found: list[dict[int, list[float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return {number: numbers for part in found for number, numbers in part.items()}
