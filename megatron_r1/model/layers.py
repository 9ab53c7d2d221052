"""The two modules that replace Megatron's local norm and attention, and the spec surgery that puts them in.

megatron-core 0.16.1's local layer spec cannot build multi-latent attention (`DotProductAttention` knows
neither `k_channels` nor packed sequences nor context parallelism) and its `WrappedTorchNorm` refuses
sequence parallelism. Both are plain torch here, so they run on CPU and GPU alike.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, marked for sequence parallelism so that its gradient is summed over the TP group."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            norm = norm.to(torch.cuda.current_device())
        for param in norm.parameters():
            vars(param)["sequence_parallel"] = config.sequence_parallel
        return norm


class SdpaAttention(MegatronModule):
    """Causal core attention by `torch.nn.functional.scaled_dot_product_attention`.

    Takes query and key `[seq, batch, heads, head_dim]` and value `[seq, batch, heads, value_dim]`, or packed
    `[tokens, heads, dim]` with `PackedSeqParams`. Returns `[seq, batch, heads * value_dim]` or
    `[tokens, heads * value_dim]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"SdpaAttention is causal only, not {attn_mask_type}")
        if pg_collection is not None and pg_collection.cp.size() > 1:
            raise ValueError("SdpaAttention does not cut the sequence over context-parallel ranks")
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(k_channels or config.kv_channels)
        self.current_max_attn_logits = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention output with the heads side by side in the last dimension."""
        if packed_seq_params is None:
            output = self._attend(*(tensor.transpose(0, 1) for tensor in (query, key, value)))
            return output.transpose(0, 1).flatten(2)
        rows, longest = packed_seq_params.cu_seqlens_q.numel() - 1, packed_seq_params.max_seqlen_q
        index = _padded_index(packed_seq_params.cu_seqlens_q, longest)
        padded = [_pad(tensor, index, rows, longest) for tensor in (query, key, value)]
        return self._attend(*padded).flatten(0, 1).index_select(0, index).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, heads, dim]` in and out. Rows padded at the end need no mask: causality hides the padding."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        grouped = k.size(1) != q.size(1)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return output.transpose(1, 2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}


def _padded_index(cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """Where each packed token stands in a `[rows * longest]` padded batch. [tokens]"""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    shift = torch.arange(lengths.numel(), device=starts.device) * longest - starts
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def _pad(packed: torch.Tensor, index: torch.Tensor, rows: int, longest: int) -> torch.Tensor:
    """`[tokens, heads, dim]` to `[rows, longest, heads, dim]`, zeros behind each row."""
    flat = packed.new_zeros(rows * longest, *packed.shape[1:]).index_copy(0, index, packed)
    return flat.view(rows, longest, *packed.shape[1:])


REPLACEMENTS: dict[type, type] = {WrappedTorchNorm: Norm, DotProductAttention: SdpaAttention}


def with_replacements(spec: Any) -> Any:
    """A copy of a (nested) layer spec with every class in `REPLACEMENTS` exchanged."""
    if isinstance(spec, type):
        return REPLACEMENTS.get(spec, spec)
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(
            spec, module=with_replacements(spec.module), submodules=with_replacements(spec.submodules)
        )
    if isinstance(spec, list | tuple):
        return type(spec)(with_replacements(item) for item in spec)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changed = {f.name: with_replacements(getattr(spec, f.name)) for f in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **changed)
    return spec
