"""[model.memory]: what is kept of a forward pass, and what is computed again in the backward pass."""

from typing import Literal

from pydantic import model_validator

from megatron_r1.config.section import Section


class MemorySection(Section):
    """[model.memory]: activations that are computed twice instead of kept (arXiv 2205.05198). Results are the same."""

    recompute: Literal["none", "selective", "full"] = "none"
    """"selective" computes `recompute_modules` again, "full" whole layers, of which it keeps the inputs alone."""
    recompute_modules: list[
        Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]
    ] = []
    """Attention between projections; norms of a layer's input and of its MLP's; the up-projections of multi-latent
    attention with the rotation; dense MLPs; mixtures of experts with their routers; the experts' SwiGLU alone (with
    `grouped_gemm`); shared experts alone. DeepSeek-V3 (3.2.3) recomputes `["layernorm", "mla_up_proj"]`, and the SwiGLU
    (3.3.3)."""

    @model_validator(mode="after")
    def _consistent(self) -> "MemorySection":
        if (self.recompute == "selective") != bool(self.recompute_modules):
            raise ValueError(
                'recompute_modules says what recompute = "selective" computes again: write both, or neither'
            )
        for part in ("shared_experts", "moe_act"):
            if {"moe", part} <= set(self.recompute_modules):
                raise ValueError(f'recompute_modules: "moe" computes that again, too: drop "{part}"')
        return self
