"""LoRA: low-rank adapters beside frozen linear layers (Hu et al., arXiv 2106.09685, section 4.1).

::

    h = W x + alpha / rank * B A x        A [rank, in] random, B [out, rank] zero

An adapter is a child module `lora` of Megatron's own linear layer, added by a hook on that layer's output. So the
optimizer, which takes what needs a gradient, and checkpoints, which take every tensor, need to know nothing of it; the
table of tensor names gives W + alpha / rank * B A, so engines and Hugging Face folders only ever see whole weights.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_r1.config.sections import LoraSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.placement import ParameterCounts
from megatron_r1.model.scalar_head import ScalarHead

T = TypeVar("T")

_CHILD = "lora"
_MIB = 2**20


class Adapter(torch.nn.Module):
    """One layer's A and B.

    Args:
        weight: W of the layer. [out, in]
        section: the run's [model.lora].
    """

    def __init__(self, weight: torch.Tensor, section: LoraSection) -> None:
        super().__init__()
        rows, columns = weight.shape
        # The authors' code draws A as torch.nn.Linear does. On the CPU, so every device begins alike.
        drawn = torch.empty(section.rank, columns).uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns))
        self.a = torch.nn.Parameter(drawn.to(weight))
        self.b = torch.nn.Parameter(weight.new_zeros(rows, section.rank))
        self.scale = section.alpha / section.rank
        self.dropout = section.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to W x. `[..., in]` -> `[..., out]`"""
        return F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.a), self.b) * self.scale

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """W + scale B A, computed in float32 and rounded to W's dtype. [out, in]

        In bfloat16 a small product is partly lost there, and engines see a little less of it than the trainer.
        """
        return torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scale).to(weight.dtype)


def attach(model: GPTModel, section: LoraSection) -> None:
    """Freeze `model` and give its linear layers adapters. A scalar head, which begins at random, is trained whole.

    Raises:
        ConfigError: there is no layer of that kind, or matrices are cut over ranks.
    """
    sizes = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    if cut := [f"{name} = {size}" for name, size in sizes.items() if size > 1]:
        raise ConfigError(f"[model.lora] does not work with {' and '.join(cut)} of [parallel]: leave one of them out")
    model.requires_grad_(False)
    head = getattr(model, "output_layer", None)  # only the last pipeline stage has one
    if isinstance(head, ScalarHead):
        head.requires_grad_(True)
    linears = [
        (_kind(name), module)
        for name, module in model.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    ]
    for target in dict.fromkeys(section.targets):
        chosen = [linear for kind, linear in linears if kind == target]
        if not chosen:
            raise ConfigError(f"model.lora.targets names {target!r}, but the model has no linear layers of that kind")
        for linear in chosen:
            linear.add_module(_CHILD, Adapter(linear.weight, section))
            linear.register_forward_hook(_add)


def adapters(model: torch.nn.Module) -> dict[str, Adapter]:
    """Name of the weight that an adapter belongs to -> the adapter."""
    return {
        f"{name.removesuffix(f'.{_CHILD}')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }


def without_adapters(tensors: dict[str, T]) -> dict[str, T]:
    """What belongs to a model's tensors by name, but to those of its adapters."""
    return {name: tensor for name, tensor in tensors.items() if f".{_CHILD}." not in name}


def size(counts: ParameterCounts, dtype: torch.dtype) -> str:
    """How many parameters there are, how many are trained and what that saves, for people."""
    total, trained = counts
    if trained == total:
        return f"{total:,} parameters"
    # A float32 gradient and Adam's two moments; a bfloat16 parameter has a float32 master copy, too.
    saved = (total - trained) * (12 if dtype is torch.float32 else 16)
    return (
        f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}), which saves {saved / _MIB:,.1f} MiB "
        "of gradients and optimizer state over all ranks"
    )


def _kind(name: str) -> str | None:
    """Which of `LoraSection.targets` a linear layer belongs to; None = none (the output layer)."""
    if ".experts." in name:
        return "experts"
    return next((kind for kind, part in (("attention", ".self_attention."), ("mlp", ".mlp.")) if part in name), None)


def _add(
    linear: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden, bias = output
    return hidden + linear.get_submodule(_CHILD)(inputs[0]), bias
