"""A package `transformer_engine` of plain torch, with the real one's names, arguments and parameters, for one process.

Megatron's layer spec for Transformer Engine can be built with it where there is no GPU: its wrappers, its names of
tensors, and what our table of names and the trainer make of them. It says nothing of the real kernels. Names and
arguments are those of Transformer Engine 2.9.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

VERSION = "2.9.0"


class _Module(torch.nn.Module):
    """What all of them have: no state beside parameters, and the switch for weight gradients."""

    def __init__(self, fuse_wgrad_accumulation: bool = False, parallel_mode: str | None = None, **rest: Any) -> None:
        torch.nn.Module.__init__(self)
        self.fuse_wgrad_accumulation, self.parallel_mode = fuse_wgrad_accumulation, parallel_mode
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = self.save_original_input = False
        self.asked = rest

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


def _weight(rows: int, columns: int, dtype: torch.dtype, initialise: Callable[[torch.Tensor], Any]) -> Any:
    weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype))
    with torch.no_grad():
        initialise(weight)
    return weight


class Linear(_Module):
    def __init__(
        self, in_features: int, out_features: int, *, init_method: Any, bias: bool, params_dtype: Any, **rest: Any
    ) -> None:
        _Module.__init__(self, **rest)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.weight = _weight(out_features, in_features, params_dtype, init_method)
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **rest: Any) -> None:
        Linear.__init__(self, in_features, out_features, **rest)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=rest["params_dtype"]))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return Linear.forward(self, F.rms_norm(x, (self.in_features,), self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        init_method: Any,
        bias: bool,
        params_dtype: Any,
        **rest: Any,
    ) -> None:
        _Module.__init__(self, **rest)
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        for number in range(num_gemms):
            weight = _weight(out_features, in_features, params_dtype, init_method)
            self.register_parameter(f"weight{number}", weight)

    def forward(
        self, x: torch.Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor:
        parts = x.split(list(m_splits))
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class RMSNorm(_Module):
    def __init__(
        self, normalized_shape: int = 0, *, eps: float, params_dtype: Any, hidden_size: int = 0, **rest: Any
    ) -> None:
        """megatron-core 0.16 uses the older name, `hidden_size`."""
        _Module.__init__(self)
        del self.fuse_wgrad_accumulation  # the real one has no product
        self.eps, self.asked = eps, rest
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DotProductAttention(_Module):
    def __init__(
        self, num_attention_heads: int, kv_channels: Any, softmax_scale: float | None = None, **rest: Any
    ) -> None:
        _Module.__init__(self)
        del self.fuse_wgrad_accumulation
        self.channels, self.scale, self.asked = kv_channels, softmax_scale, rest

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        attn_mask_type: str,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return self._attend(*(t.permute(1, 2, 0, 3) for t in (query, key, value))).permute(2, 0, 1, 3).flatten(2)
        assert attn_mask_type == "padding_causal"
        assert cu_seqlens_q is not None
        assert cu_seqlens_q.dtype == torch.int32
        parts = [
            self._attend(*(t[start:end].transpose(0, 1)[None] for t in (query, key, value)))[0].transpose(0, 1)
            for start, end in pairwise(cu_seqlens_q.tolist())
        ]
        return torch.cat(parts).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)


class _Manager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class _Recipe:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


def install() -> None:
    """Put it where `import` finds it; before anything imports megatron.core."""
    no_context = contextlib.nullcontext
    linears = {"Linear": Linear, "LayerNormLinear": LayerNormLinear, "GroupedLinear": GroupedLinear}
    recipes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    names: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {name: type(name, (_Recipe,), {}) for name in recipes}
        | {"Format": SimpleNamespace(E4M3="e4m3", HYBRID="hybrid")},
        ".pytorch": {**linears, "RMSNorm": RMSNorm, "LayerNorm": RMSNorm, "DotProductAttention": DotProductAttention}
        | {
            "fp8_autocast": no_context,
            "fp8_model_init": no_context,
            "Fp8Padding": torch.nn.Identity,
            "Fp8Unpadding": torch.nn.Identity,
        },
        ".pytorch.ops": {"Sequential": object, "FusibleOperation": object},
        ".pytorch.fp8": {"FP8GlobalStateManager": _Manager}
        | {"fp8_autocast": no_context, "fp8_model_init": no_context},
        ".pytorch.distributed": {"CudaRNGStatesTracker": object, "activation_recompute_forward": no_context}
        | {"checkpoint": None},
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        ".pytorch.router": dict.fromkeys(
            ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
        ),
    }
    for name, members in names.items():
        module = ModuleType(f"transformer_engine{name}")
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
