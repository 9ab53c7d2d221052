"""The modules that replace Megatron's local norm and attention, and the spec surgery that puts them in.

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
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules


class FusedNorm(torch.nn.Module):
    """RMSNorm or LayerNorm, marked for sequence parallelism so that its gradient is summed over the TP group.

    Stands where Transformer Engine has one module of a norm and the linear layer behind it.
    """

    kinds: dict[str, type[torch.nn.Module]] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        norm = cls.kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            norm = norm.to(torch.cuda.current_device())
        for param in norm.parameters():
            vars(param)["sequence_parallel"] = config.sequence_parallel
        return norm


class _EmptyState(torch.nn.Module):
    """Saves an empty state, as Megatron's linear layers do, because Transformer Engine's norms look for one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state"))

    def get_extra_state(self) -> None:
        """Nothing."""

    def set_extra_state(self, state: Any) -> None:
        """Ignored: the scales of 8-bit kernels, which plain torch does not have."""


class _RmsNorm(_EmptyState, torch.nn.RMSNorm):
    pass


class _LayerNorm(_EmptyState, torch.nn.LayerNorm):
    pass


class Norm(FusedNorm):
    """The same where Transformer Engine has a norm by itself."""

    kinds = {"RMSNorm": _RmsNorm, "LayerNorm": _LayerNorm}


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
    """A copy of a (nested) layer spec with every class in `REPLACEMENTS` exchanged.

    Its tensors are saved under the names that they have under Transformer Engine's spec, so that what was saved on a
    CPU is read on a GPU.
    """
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
        replaced = dataclasses.replace(spec, **changed)
        return _named_as_fused(replaced) if isinstance(replaced, TransformerLayerSubmodules) else replaced
    return spec


def _named_as_fused(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Name the norms that Transformer Engine's spec (gpt_layer_specs.py:181) fuses into a linear layer after that.

    Upstream's local spec has no such names for multi-latent attention, and gives a mixture of experts, whose norm is
    not fused, that of a dense MLP.
    """
    attention, names, fused = layer.self_attention, {}, {}
    if attention.module is MLASelfAttention:
        parts = attention.submodules
        norms = {name: _fused(getattr(parts, name)) for name in ("q_layernorm", "kv_layernorm")}
        fused["self_attention"] = dataclasses.replace(attention, submodules=dataclasses.replace(parts, **norms))
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        fused["input_layernorm"] = _fused(layer.input_layernorm)
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if layer.mlp.module is MLP:
        fused["pre_mlp_layernorm"] = _fused(layer.pre_mlp_layernorm)
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return dataclasses.replace(layer, sharded_state_dict_keys_map=names, **fused)


def _fused(module: Any) -> Any:
    return FusedNorm if module is Norm else module
