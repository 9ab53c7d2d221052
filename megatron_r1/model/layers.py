"""The modules that replace Megatron's local norm and attention, and the spec surgery that puts them in.

megatron-core 0.16.1's local layer spec cannot build multi-latent attention (`DotProductAttention` knows
neither `k_channels` nor packed sequences nor context parallelism) and its `WrappedTorchNorm` refuses
sequence parallelism. Both are plain torch here, so they run on CPU and GPU alike.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import LNImpl
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_r1.compat.megatron_specs import rebuilt, recomputes_packed, submodules
from megatron_r1.model import context
from megatron_r1.model.recompute import MtpLayer


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
    """Saves an empty state, as Megatron's linear layers do, because Transformer Engine's modules look for one."""

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


class SdpaAttention(_EmptyState, MegatronModule):
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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"SdpaAttention is causal only, not {attn_mask_type}")
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
        if context.size() > 1:
            return self._over_context(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
            output = self._attend(query, key, value)
            return output.transpose(0, 1).flatten(2)
        rows, longest = packed_seq_params.cu_seqlens_q.numel() - 1, packed_seq_params.max_seqlen_q
        index = _padded_index(packed_seq_params.cu_seqlens_q, longest)
        query, key, value = (_pad(tensor, index, rows, longest) for tensor in (query, key, value))
        return self._attend(query, key, value).flatten(0, 1).index_select(0, index).flatten(1)

    def _over_context(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams | None
    ) -> torch.Tensor:
        """Queries of this rank's tokens, keys and values of all ranks'."""
        length = query.size(0) * context.size()
        ends = torch.tensor([0, length], device=query.device) if packed is None else packed.cu_seqlens_q
        key, value = (context.whole(tensor, ends, 0, summed=True) for tensor in (key, value))
        own = context.positions(ends)
        if packed is None:
            seen = torch.arange(length, device=query.device) <= own[:, None]
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
            output = self._attend(query, key, value, seen)
            return output.transpose(0, 1).flatten(2)
        rows, longest = ends.numel() - 1, packed.max_seqlen_q
        local_ends, local_longest = ends // context.size(), longest // context.size()
        index, local = _padded_index(ends, longest), _padded_index(local_ends, local_longest)
        key, value = (_pad(tensor, index, rows, longest) for tensor in (key, value))
        place = own - ends[:-1].repeat_interleave(local_ends.diff())
        seen = torch.arange(longest, device=query.device) <= _pad(place, local, rows, local_longest)[..., None]
        output = self._attend(_pad(query, local, rows, local_longest), key, value, seen[:, None])
        return output.flatten(0, 1).index_select(0, local).flatten(1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[batch, seq, heads, dim]` in and out. Rows padded at the end need no mask: causality hides the padding.

        `seen`: which keys each query sees, None = those up to it. [..., queries, keys]
        """
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        grouped = k.size(1) != q.size(1)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=self.scale, enable_gqa=grouped
        )
        return output.transpose(1, 2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save. (The MTP block asks for plain states beside these, and so saves its layers' empty one.)"""
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


FUSED: dict[type, type] = {} if recomputes_packed(MultiTokenPredictionLayer) else {MultiTokenPredictionLayer: MtpLayer}
"""What is exchanged in Transformer Engine's spec."""
LOCAL: dict[type, type] = FUSED | {LNImpl: Norm, WrappedTorchNorm: Norm, DotProductAttention: SdpaAttention}
"""What is exchanged in the local spec. Where Apex is installed `LNImpl` is its norm, which is no RMSNorm."""


def with_replacements(spec: Any, fused: bool = False, query_norm: bool = True) -> Any:
    """A copy of a (nested) layer spec with every class in `LOCAL`, or in `FUSED`, exchanged.

    The local spec's tensors are saved under the names that they have under Transformer Engine's, so that what was saved
    with the one is read with the other.

    Args:
        spec: of a layer or a block.
        fused: whether it is Transformer Engine's.
        query_norm: whether multi-latent attention compresses queries, and so has a norm of them.
    """
    again = partial(with_replacements, fused=fused, query_norm=query_norm)
    if isinstance(spec, type):
        return (FUSED if fused else LOCAL).get(spec, spec)
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(spec, module=again(spec.module), submodules=again(spec.submodules))
    if isinstance(spec, partial):
        return rebuilt(spec, again)
    if isinstance(spec, list | tuple):
        return type(spec)(again(item) for item in spec)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        replaced = dataclasses.replace(spec, **{f.name: again(getattr(spec, f.name)) for f in dataclasses.fields(spec)})
        local = isinstance(replaced, TransformerLayerSubmodules) and not fused
        return _named_as_fused(replaced, query_norm) if local else replaced
    return spec


def _named_as_fused(layer: TransformerLayerSubmodules, query_norm: bool) -> TransformerLayerSubmodules:
    """Name the norms that Transformer Engine's spec (gpt_layer_specs.py:181) fuses into a linear layer after that.

    Upstream's local spec has no such names for multi-latent attention, and gives a mixture of experts, whose norm is
    not fused, that of a dense MLP.
    """
    attention, names, fused = layer.self_attention, {}, {}
    if attention.module is MLASelfAttention:
        parts = attention.submodules
        norms = {"q_layernorm": _fused(parts.q_layernorm) if query_norm else IdentityOp}
        norms["kv_layernorm"] = _fused(parts.kv_layernorm)
        fused["self_attention"] = dataclasses.replace(attention, submodules=dataclasses.replace(parts, **norms))
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        fused["input_layernorm"] = _fused(layer.input_layernorm)
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if isinstance(submodules(layer.mlp), MLPSubmodules):
        fused["pre_mlp_layernorm"] = _fused(layer.pre_mlp_layernorm)
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return dataclasses.replace(layer, sharded_state_dict_keys_map=names, **fused)


def _fused(module: Any) -> Any:
    return FusedNorm if module is Norm else module
