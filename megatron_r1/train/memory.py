"""What a model in training keeps in memory besides activations."""

import resource

import torch
import torch.distributed as dist

from megatron_r1.model.parallel import device
from megatron_r1.model.trainable import Trainable

_MOMENTS = 2
"""Numbers that Adam keeps for each weight, float32 as the gradients are."""


def state_bytes(trainable: Trainable) -> int:
    """Bytes of weights, gradients and optimizer state on this rank, once the first update has made all of it."""
    params = [param for chunk in trainable.chunks for param in chunk.parameters()]
    weights = sum(param.numel() * param.element_size() for param in params)
    gradients = sum(
        buffer.grad_data.nbytes for ddp in trainable.ddp for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]
    )
    mains = [param for group in trainable.optimizer.param_groups for param in group["params"]]
    copies = 1 if trainable.chunks[0].config.bf16 else 0  # in float32 the optimizer works on the model's own weights
    state = sum(param.numel() * param.element_size() * (_MOMENTS + copies) for param in mains)
    return int(weights + gradients + state)


def peak() -> dict[str, float]:
    """`memory_peak_max`: GiB of the process that has needed most so far. All ranks call it together."""
    cuda = torch.cuda.is_available()
    own = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.tensor(own / 2**30, device=device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"memory_peak_max": float(most)}


def in_words(name: str, trainable: Trainable) -> str:
    """`policy 4.3 MB`."""
    return f"{name} {state_bytes(trainable) / 1e6:,.1f} MB"
