"""What the training loops need of the logits themselves: the sampling temperature, the entropy, and no more than count.

GPTModel returns the cross-entropy of given labels, which is all that a loss needs; this observes its output layer for
the rest. With a large vocabulary that layer is much of a pass, and prompts need none of it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

CHUNK = 1024
"""Positions whose entropy is computed at once: a whole batch of float32 copies of logits is many GiB."""


class LogitsObserver:
    """Divides a model's logits by a temperature and, while asked to, records their entropy, or leaves positions out.

    The main head is the last to call the output layer in a forward pass, after the MTP heads: of every pass the
    last call is recorded.
    """

    def __init__(self, model: GPTModel, temperature: float) -> None:
        self.temperature = temperature
        self._entropies: list[torch.Tensor] | None = None
        self._heads = 1 + (model.config.mtp_num_layers or 0)
        self._calls = 0
        self._positions: torch.Tensor | None = None
        model.output_layer.register_forward_pre_hook(self._narrow)
        model.output_layer.register_forward_hook(self._hook)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[torch.Tensor]]:
        """Collects one `[rows, seq]` tensor of entropies, nats, for each forward pass inside, of this rank's tokens.

        Under `only`, of those alone that have logits.
        """
        self._entropies, self._calls = [], 0
        try:
            yield self._entropies
        finally:
            self._entropies = None

    @contextlib.contextmanager
    def only(self, positions: torch.Tensor | None) -> Iterator[None]:
        """Forward passes inside, of one row, compute logits at these positions alone (None = at all). `[selected]`"""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _narrow(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """`[seq, 1, hidden]` -> `[selected, 1, hidden]`"""
        return args if self._positions is None else (args[0][self._positions], *args[1:])

    def _hook(self, module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        if self.temperature != 1.0:
            # As the engine does: a quotient rounded to bfloat16 is 0.02 nats off. In place: there is no larger tensor.
            logits = logits.to(torch.float32, copy=True).div_(self.temperature)
        if self._entropies is not None:
            self._calls += 1
            if self._calls % self._heads == 0:
                self._entropies.append(entropy(logits.detach()).transpose(0, 1))
        return logits, bias


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H = log Z - sum_v p_v z_v of each row of logits, nats. `[..., vocab]` -> `[...]`

    Each tensor-parallel rank has its part of the vocabulary, and gets the entropy over all of it.
    """
    return torch.cat([_entropy(chunk.float()) for chunk in logits.split(CHUNK)])


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    largest = logits.max(dim=-1).values
    _reduce(largest, dist.ReduceOp.MAX)
    shifted = logits - largest[..., None]
    weights = shifted.exp()
    sums = torch.stack([weights.sum(-1), (weights * shifted).sum(-1)])
    _reduce(sums, dist.ReduceOp.SUM)
    normalizer, energy = sums
    return normalizer.log() - energy / normalizer


def _reduce(values: torch.Tensor, how: Any) -> None:
    if parallel_state.model_parallel_is_initialized() and parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(values, how, group=parallel_state.get_tensor_model_parallel_group())
