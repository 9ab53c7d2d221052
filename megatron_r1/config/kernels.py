"""[model.kernels] and [model.fp8]: which modules compute the layers on a GPU, and in what numbers.

Keys that are not given take a default that depends on the layers that are chosen: `HOPPER` with Transformer Engine's,
`LOCAL` with plain torch's. What does not go together is refused by `model/kernels.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_r1.config.section import Section

Layers = Literal["local", "transformer_engine"]
Offloaded = Literal["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


class KernelsSection(Section):
    """[model.kernels]: fused modules and what they overlap. Nothing of it changes what is computed but for rounding."""

    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """"local" = plain torch, on CPU and GPU alike; "transformer_engine" = NVIDIA's fused modules; "auto" = the latter
    where there is a CUDA device and the package. The choice is printed."""
    attention: Literal["auto", "flash", "fused", "unfused"] | None = None
    """What Transformer Engine computes attention with; "fused" is cuDNN's."""
    grouped_gemm: bool | None = None
    """All experts of a rank in one call instead of one after another."""
    permute_fusion: bool | None = None
    """One kernel sorts tokens by experts and back."""
    router_fusion: bool | None = None
    """One kernel scores and chooses experts."""
    activation_fusion: bool | None = None
    """One kernel for SwiGLU, with the router's weight where experts have it, and one for dropout and residual."""
    rope_fusion: bool | None = None
    """One kernel rotates queries and keys; upstream calls that of multi-latent attention experimental."""
    cross_entropy_fusion: Literal["none", "native", "te"] | None = None
    """Loss of the vocabulary in one pass: Megatron's, or Transformer Engine's Triton kernel, which writes the gradient
    over the logits."""
    gradient_accumulation_fusion: bool | None = None
    """Products add weight gradients to the float32 buffer themselves; for the output layer that needs Apex's
    `fused_weight_gradient_mlp_cuda`, and is left out where it is not there."""
    dispatcher: Literal["alltoall", "deepep", "hybridep"] | None = None
    """How tokens reach the experts of other ranks: one copy for each expert, or one for each node."""
    dispatcher_sms: PositiveInt | None = None
    """Streaming multiprocessors that "deepep" (20) or "hybridep" (16) takes for itself."""
    shared_expert_overlap: bool | None = None
    """Shared experts work while tokens are under way to the routed ones."""
    overlap_expert_exchange: bool | None = None
    """The exchange of one microbatch is hidden behind the computation of another (DeepSeek-V3's DualPipe does so, too;
    here within one forward, one backward)."""
    delay_weight_gradient: bool | None = None
    """With `overlap_expert_exchange`, weight gradients wait until there is an exchange to hide."""
    cuda_graphs: Literal["none", "local"] | None = None
    """"local" records the kernels of each layer once and replays them: for dense models in `pretrain`, whose rows are
    all of one length."""
    overlap_gradient_reduction: bool | None = None
    """Gradients are summed over data-parallel ranks while the backward pass goes on."""
    activation_offload: list[Offloaded] = []
    """Inputs of these modules wait in the host's memory for the backward pass."""

    def resolved(self, layers: Layers) -> dict[str, Any]:
        """All keys but `layers`, with the defaults that belong to these layers."""
        given = {name: value for name, value in self if name in self.model_fields_set and value is not None}
        given.pop("layers", None)
        return {**(HOPPER if layers == "transformer_engine" else LOCAL), **given}


HOPPER: dict[str, Any] = {
    "attention": "auto",
    "grouped_gemm": True,
    "permute_fusion": True,
    "router_fusion": False,
    "activation_fusion": True,
    "rope_fusion": False,
    "cross_entropy_fusion": "native",
    "gradient_accumulation_fusion": True,
    "dispatcher": "alltoall",
    "dispatcher_sms": None,
    "shared_expert_overlap": False,
    "overlap_expert_exchange": False,
    "delay_weight_gradient": False,
    "cuda_graphs": "none",
    "overlap_gradient_reduction": True,
    "activation_offload": [],
}
"""Defaults with Transformer Engine's layers; docs/kernels.md says why."""

LOCAL: dict[str, Any] = HOPPER | {
    "grouped_gemm": False,
    "permute_fusion": False,
    "activation_fusion": False,
    "cross_entropy_fusion": "none",
    "overlap_gradient_reduction": False,
}
"""Defaults with plain torch's."""


class Fp8Section(Section):
    """[model.fp8]: products of linear layers in 8 bits, forward and backward.

    As in DeepSeek-V3 (arXiv 2412.19437, 3.3.1) embedding, output layer, routers, norms, attention between its
    projections, master weights and weight gradients stay in higher precision.
    """

    recipe: Literal["blockwise", "current", "delayed", "mxfp8"] = "blockwise"
    """One scale for: "blockwise" 1 x 128 numbers of activations and gradients, 128 x 128 of weights (DeepSeek-V3
    3.3.2); "current" a tensor, from its own largest number; "delayed" a tensor, from those of earlier steps; "mxfp8" 32
    numbers (Blackwell)."""
    format: Literal["e4m3", "hybrid"] | None = None
    """"hybrid" = e5m2 for gradients. Default: e4m3 where blocks have scales of their own, hybrid where tensors have."""
    parameters: bool = False
    """Weights are kept and gathered in 8 bits, beside the optimizer's master copy."""
    first_bf16_layers: NonNegativeInt = 0
    last_bf16_layers: NonNegativeInt = 0
    """So many layers at the beginning and at the end stay in BF16."""
    weight_gradients: bool = True
    """With "delayed": false computes the products that give weight gradients in BF16."""
    amax_history: PositiveInt = 1024
    """With "delayed": steps whose largest number gives the scale."""
    margin: Annotated[int, Field(ge=0)] = 0
    """With "delayed": powers of two that are left free above the largest number."""

    @property
    def gradients_format(self) -> Literal["e4m3", "hybrid"]:
        """`format`, or its default."""
        return self.format or ("e4m3" if self.recipe in ("blockwise", "mxfp8") else "hybrid")
