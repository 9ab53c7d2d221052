"""What a model in training keeps in memory besides activations."""

from megatron_r1.model.trainable import Trainable

_MOMENTS = 2
"""Numbers that Adam keeps for each weight, float32 as the gradients are."""


def state_bytes(trainable: Trainable) -> int:
    """Bytes of weights, gradients and optimizer state on this rank, once the first update has made all of it."""
    ddp, module = trainable.ddp, trainable.module
    weights = sum(param.numel() * param.element_size() for param in module.parameters())
    gradients = sum(buffer.grad_data.nbytes for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers])
    mains = [param for group in trainable.optimizer.param_groups for param in group["params"]]
    copies = 1 if module.config.bf16 else 0  # in float32 the optimizer works on the model's own weights
    state = sum(param.numel() * param.element_size() * (_MOMENTS + copies) for param in mains)
    return int(weights + gradients + state)


def in_words(name: str, trainable: Trainable) -> str:
    """`policy 4.3 MB`."""
    return f"{name} {state_bytes(trainable) / 1e6:,.1f} MB"
