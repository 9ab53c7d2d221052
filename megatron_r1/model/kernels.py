"""Which modules compute a model's layers on this machine, and Megatron's words for it.

[model.kernels] and [model.fp8] in, fields of `TransformerConfig` out. What does not go together stands in
`kernel_rules.py`.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_te_version
from packaging.version import Version

from megatron_r1.config.kernels import Fp8Section, Layers
from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import ConfigError

FP8_UNIT = {"blockwise": 16, "current": 16, "delayed": 16, "mxfp8": 32}
"""What rows and columns of an 8-bit product divide by, tokens included (cuBLASLt; 32 numbers share a scale in MXFP8).
Blocks of 128 may be cut short at the end, as DeepSeek-V3's 576 columns of compressed keys and values are."""


@dataclass(frozen=True)
class Machine:
    """What there is to compute with."""

    cuda: tuple[int, int] | None = None
    """Version that torch was built for; None where there is no device."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability; Hopper is (9, 0), Blackwell (10, 0)."""
    transformer_engine: Version | None = None
    head_fusion: bool = False
    """Whether Apex's `fused_weight_gradient_mlp_cuda` is there."""
    deep_ep: bool = False

    @classmethod
    def here(cls) -> "Machine":
        """This process's."""
        present = torch.cuda.is_available() and torch.version.cuda is not None
        major, minor = (torch.version.cuda or "0.0").split(".")[:2]
        return cls(
            cuda=(int(major), int(minor)) if present else None,
            capability=torch.cuda.get_device_capability() if present else (0, 0),
            transformer_engine=get_te_version() if fp8_utils.HAVE_TE else None,
            head_fusion=present and bool(tensor_parallel_layers._grad_accum_fusion_available),
            deep_ep=importlib.util.find_spec("deep_ep") is not None,
        )


@dataclass(frozen=True)
class Kernels:
    """What was chosen."""

    layers: Layers
    why: str
    options: dict[str, Any]
    """[model.kernels] with the defaults that belong to these layers."""
    fp8: Fp8Section | None

    @property
    def fused(self) -> bool:
        """Whether the layers are Transformer Engine's."""
        return self.layers == "transformer_engine"

    @property
    def said(self) -> str:
        """The choice, for people."""
        name = "Transformer Engine's" if self.fused else "plain torch's"
        numbers = f", products in FP8 ({self.fp8.recipe})" if self.fp8 else ""
        return f"layers are {name}: {self.why}{numbers}"


def choose(section: ModelSection, machine: Machine) -> Kernels:
    """The modules of a model.

    Args:
        section: the run's [model].
        machine: where it is computed.
    """
    layers, why = _layers(section, machine)
    return Kernels(layers, why, section.kernels.resolved(layers), section.fp8)


def _layers(section: ModelSection, machine: Machine) -> tuple[Layers, str]:
    asked = section.kernels.layers
    if asked != "auto":
        return asked, "model.kernels.layers says so"
    if machine.cuda is None:
        return "local", "there is no CUDA device"
    if machine.transformer_engine is None:
        return "local", "the package transformer-engine is not installed"
    if section.dtype == "float32":
        return "local", "Transformer Engine's attention has no float32"
    if section.lora:
        return "local", "adapters stand beside plain linear layers"
    return "transformer_engine", f"version {machine.transformer_engine} is installed"


def kernel_options(kernels: Kernels, machine: Machine) -> dict[str, Any]:
    """The part of every family's `TransformerConfig` that says what its modules are computed with."""
    own = kernels.options
    exchange = own["dispatcher"]
    node = exchange in ("deepep", "hybridep")
    cross_entropy = own["cross_entropy_fusion"]
    options = {
        "transformer_impl": kernels.layers,
        "attention_backend": AttnBackend[own["attention"]],
        "bias_dropout_fusion": own["activation_fusion"],
        "bias_activation_fusion": own["activation_fusion"],
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": own["rope_fusion"],
        "cross_entropy_loss_fusion": cross_entropy != "none",
        "cross_entropy_fusion_impl": "te" if cross_entropy == "te" else "native",
        # The output layer raises without Apex's kernel; Transformer Engine's modules have one (`sum_in_products`).
        "gradient_accumulation_fusion": own["gradient_accumulation_fusion"] and machine.head_fusion,
        "moe_grouped_gemm": own["grouped_gemm"],
        "moe_permute_fusion": own["permute_fusion"],
        "moe_router_fusion": own["router_fusion"],
        # Not "allgather", Megatron's default: it refuses variable lengths, even without experts.
        "moe_token_dispatcher_type": "flex" if node else "alltoall",
        "moe_shared_expert_overlap": own["shared_expert_overlap"],
        "overlap_moe_expert_parallel_comm": own["overlap_expert_exchange"],
        "delay_wgrad_compute": own["delay_weight_gradient"],
        "cuda_graph_impl": own["cuda_graphs"],
        "fine_grained_activation_offloading": bool(own["activation_offload"]),
        "offload_modules": list(own["activation_offload"]),
    }
    if node:
        options["moe_flex_dispatcher_backend"] = exchange
        if own["dispatcher_sms"]:
            options[f"moe_{exchange}_num_sms"] = own["dispatcher_sms"]
    return options | (_fp8_options(kernels.fp8) if kernels.fp8 else {})


def _fp8_options(section: Fp8Section) -> dict[str, Any]:
    bf16 = section.first_bf16_layers + section.last_bf16_layers > 0
    return {
        "fp8": section.gradients_format,
        "fp8_recipe": "tensorwise" if section.recipe == "current" else section.recipe,
        "fp8_param": section.parameters,
        "first_last_layers_bf16": bf16,
        "num_layers_at_start_in_bf16": section.first_bf16_layers if bf16 else 1,
        "num_layers_at_end_in_bf16": section.last_bf16_layers if bf16 else 1,
        "fp8_wgrad": section.weight_gradients,
        "fp8_amax_history_len": section.amax_history,
        "fp8_amax_compute_algo": "max",
        "fp8_margin": section.margin,
    }


def engine_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Names and linear layers of Transformer Engine, grouped or with a norm, in a part of a model."""
    for name, module in chunk.named_modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            yield name, module


def sum_in_products(chunks: Sequence[torch.nn.Module]) -> None:
    """Let Transformer Engine's products add weight gradients to the buffers that `DistributedDataParallel` has made.

    Megatron's own switch would ask for Apex, which only the output layer needs.
    """
    for chunk in chunks:
        for _, module in engine_modules(chunk):
            vars(module)["fuse_wgrad_accumulation"] = True


def refuse_uneven(chunk: torch.nn.Module, section: Fp8Section) -> None:
    """Check the matrices that are multiplied in 8 bits.

    Raises:
        ConfigError: one's sizes do not divide.
    """
    unit = FP8_UNIT[section.recipe]
    for name, module in engine_modules(chunk):
        for part, weight in module.named_parameters(recurse=False):
            if part.startswith("weight") and weight.dim() == 2 and any(size % unit for size in weight.shape):
                raise ConfigError(
                    f"[model.fp8]: {name}.{part} has shape {list(weight.shape)} on a rank, but products with recipe = "
                    f'"{section.recipe}" need multiples of {unit}: leave [model.fp8] out, or change tensor or '
                    "expert_tensor of [parallel]"
                )
