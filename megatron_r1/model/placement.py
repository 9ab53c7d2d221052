"""Which part of which tensor of the whole model a rank holds.

Megatron numbers layers and experts from zero on every rank; rules name them by their place in the whole model. The cuts
are those that Megatron saves checkpoints by.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_r1.compat.megatron_specs import name_in_rules

_LAYERS, _EXPERTS = "decoder.layers", "local_experts"
_GROUPED = re.compile(r"(.+\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")
"""Experts of one rank in one module of Transformer Engine's."""
_FUSED_NORMS = {
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".self_attention.linear_q_up_proj.layer_norm_": ".self_attention.q_layernorm.",
    ".self_attention.linear_kv_up_proj.layer_norm_": ".self_attention.kv_layernorm.",
}
"""Norms that Transformer Engine has in one module with the linear layer behind them -> their own modules, by whose
names rules know them."""
_DRAWN = "_high_precision_init_val"
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class ParameterCounts(NamedTuple):
    """How many numbers a model has."""

    total: int
    trained: int


@dataclass(frozen=True, slots=True)
class Block:
    """A box of the whole tensor, which is rows `start` to `stop - 1` of the rank's own."""

    start: int
    stop: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """Where it stands in the whole tensor."""
        return tuple(slice(low, low + size) for low, size in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank holds of one tensor of the model."""

    name: str
    """In the whole model."""
    local: str
    """In the model that is this rank's."""
    tensor: torch.Tensor
    """The rank's own, the model's memory."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    blocks: tuple[Block, ...]
    """Consecutive rows of the own tensor: a gated MLP's first matrix has two, else there is one."""
    parameter: Any = None
    """What the tensor is the memory of, where it is a parameter."""

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part."""
        if tuple(self.tensor.shape) == self.shape:
            return whole
        return torch.cat([whole[block.box] for block in self.blocks])

    def fill(self, whole: torch.Tensor) -> None:
        """Take this rank's part.

        Beside weights in 8 bits Transformer Engine keeps what they were drawn as, and the optimizer's copy begins as
        that: it is exchanged, too.
        """
        part = self.cut(whole)
        self.tensor.copy_(part)
        if getattr(self.parameter, _DRAWN, None) is not None:
            setattr(self.parameter, _DRAWN, part.to("cpu", self.tensor.dtype))


def shares(chunks: Sequence[GPTModel]) -> Iterator[Share]:
    """Every tensor that this rank holds, a tied output matrix as the embedding that it is a copy of.

    Args:
        chunks: the rank's virtual pipeline stages.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in chunks:
        names = _Names(chunk)
        for local, entry in chunk.sharded_state_dict(prefix="", metadata=metadata).items():
            if not isinstance(entry, ShardedObject):
                yield _share(names(local), local, entry)


def parameter_counts(chunks: Sequence[GPTModel]) -> ParameterCounts:
    """Of the whole model. All ranks call it together."""
    mine = {}
    for chunk in chunks:
        params = dict(chunk.named_parameters())
        for share in shares([chunk]):
            if (param := params.get(share.local)) is not None:
                mine[share.name, share.blocks] = (param.numel(), param.numel() * param.requires_grad)
    of_ranks: list[dict[Any, tuple[int, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    each = {key: count for theirs in of_ranks for key, count in theirs.items()}.values()
    return ParameterCounts(sum(total for total, _ in each), sum(trained for _, trained in each))


def _share(name: str, local: str, entry: Any) -> Share:
    parts: list[ShardedTensor] = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    blocks, start = [], 0
    for part in parts:
        ahead = part.prepend_axis_num
        stop = start + (part.local_shape[0] if part.local_shape else 1)
        blocks.append(Block(start, stop, tuple(part.global_offset[ahead:]), tuple(part.local_shape)))
        start = stop
    whole = tuple(parts[0].global_shape[parts[0].prepend_axis_num :])
    return Share(name, local, entry.data.detach(), whole, tuple(blocks), entry.data)


class _Names:
    """Names of one chunk's tensors -> names in the whole model."""

    def __init__(self, chunk: GPTModel) -> None:
        self._first_layer = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
        self._tied = chunk.share_embeddings_and_output_weights
        self._first_expert = {
            f"{name}.experts": module.local_expert_indices[0]
            for name, module in chunk.named_modules()
            if isinstance(module, MoELayer)
        }

    def __call__(self, local: str) -> str:
        if self._tied and local == _OUTPUT:
            return _EMBEDDING
        name = name_in_rules(self._norm(self._expert(local)))
        if not name.startswith(_LAYERS):
            return name
        number, _, rest = name.removeprefix(f"{_LAYERS}.").partition(".")
        return f"{_LAYERS}.{int(number) + self._first_layer}.{rest}"

    @staticmethod
    def _norm(local: str) -> str:
        for fused, alone in _FUSED_NORMS.items():
            if fused in local:
                return local.replace(fused, alone)
        return local

    def _expert(self, local: str) -> str:
        if grouped := _GROUPED.fullmatch(local):
            before, part, kind, number = grouped.groups()
            return f"{before}.{_EXPERTS}.{int(number) + self._first_expert[before]}.{part}.{kind}"
        before, found, after = local.partition(f".{_EXPERTS}.")
        if not found:
            return local
        number, _, rest = after.partition(".")
        return f"{before}{found}{int(number) + self._first_expert[before]}.{rest}"
