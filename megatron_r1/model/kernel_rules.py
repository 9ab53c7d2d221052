"""What of [model.kernels], [model.fp8] and [model.memory] does not go together, as one table.

Most of it is what megatron-core 0.16.1 asserts (transformer_config.py:900), said before anything is built and in the
words of a run file. `docs/kernels.md` has the table, too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from megatron_r1.config.sections import ModelSection, OptimSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.kernels import Kernels, Machine


@dataclass(frozen=True)
class Setting:
    """What a rule looks at."""

    section: ModelSection
    kernels: Kernels
    machine: Machine
    hf: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Of [parallel], in Megatron's words; empty = one process."""
    scalar: bool = False
    """Whether the model gives a number instead of a vocabulary."""
    optim: OptimSection | None = None

    def __getitem__(self, name: str) -> Any:
        """A key of [model.kernels], its default filled in."""
        return self.kernels.options[name]

    @property
    def recipe(self) -> str:
        """Of [model.fp8], "" without."""
        return self.section.fp8.recipe if self.section.fp8 else ""

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return int(next((self.hf[key] for key in _EXPERTS if self.hf.get(key)), 0))

    @property
    def mtp(self) -> int:
        """MTP layers that are built."""
        return int(self.hf.get("num_nextn_predict_layers") or 0) if self.section.mtp_loss_coef else 0

    def ranks(self, name: str) -> int:
        """Of "tensor", "expert", "expert_tensor", "pipeline" or "context" parallelism."""
        key = f"{name}_parallel_size" if name in ("context", "expert_tensor") else f"{name}_model_parallel_size"
        return int(self.layout.get(key) or 1)

    def older(self, version: str) -> bool:
        """Whether Transformer Engine is older than that."""
        return self.machine.transformer_engine is None or self.machine.transformer_engine < Version(version)

    def recomputes(self, *modules: str) -> bool:
        """Whether one of them is computed again."""
        return bool(set(modules) & set(self.section.memory.recompute_modules))


_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def _yarn(hf: Mapping[str, Any]) -> bool:
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return "yarn" in (scaling.get("type"), scaling.get("rope_type"))


def _by_node(setting: Setting) -> bool:
    return setting["dispatcher"] in ("deepep", "hybridep")


def _graphs(setting: Setting) -> bool:
    return bool(setting["cuda_graphs"] != "none")


def _most_bf16(setting: Setting) -> int:
    """Layers that stay in BF16 at one end of the model, the larger number."""
    fp8 = setting.section.fp8
    return max(fp8.first_bf16_layers, fp8.last_bf16_layers) if fp8 else 0


@dataclass(frozen=True)
class Rule:
    """One thing that is refused."""

    what: str
    """As it stands in a run file."""
    holds: Callable[[Setting], bool]
    why: str
    instead: str

    @property
    def said(self) -> str:
        """For people."""
        return f"{self.what}: {self.why}; {self.instead}"


def refuse(rules: Sequence[Rule], setting: Setting) -> None:
    """Compare what is asked for with a table.

    Args:
        rules: `RULES` or `OPTIM_RULES`.
        setting: what is asked for, and where.

    Raises:
        ConfigError: it names all rules that hold.
    """
    if broken := [rule.said for rule in rules if rule.holds(setting)]:
        raise ConfigError("; and ".join(broken))


RULES = [
    Rule(
        'model.kernels.layers = "transformer_engine" without a CUDA device',
        lambda s: s.kernels.fused and s.machine.cuda is None,
        "its kernels run on NVIDIA GPUs alone",
        'leave `layers` out or write "local"',
    ),
    Rule(
        'model.kernels.layers = "transformer_engine" without the package',
        lambda s: s.kernels.fused and s.machine.transformer_engine is None,
        "transformer-engine cannot be imported",
        'install it (requirements/gpu, docs/h100.md), or write layers = "local"',
    ),
    Rule(
        'model.kernels.layers = "transformer_engine" with dtype = "float32"',
        lambda s: s.kernels.fused and s.section.dtype == "float32",
        "its fused attention has no float32",
        'write dtype = "bfloat16", or layers = "local"',
    ),
    Rule(
        'model.kernels.layers = "transformer_engine" with [model.lora]',
        lambda s: s.kernels.fused and s.section.lora is not None,
        "its modules of a norm and a linear layer do not give what an adapter reads",
        'write layers = "local"',
    ),
    Rule(
        "[model.fp8] with plain torch's layers",
        lambda s: bool(s.recipe) and not s.kernels.fused,
        "8-bit products are Transformer Engine's",
        "leave [model.fp8] out, or run on a Hopper GPU with transformer-engine",
    ),
    Rule(
        '[model.fp8] with dtype = "float32"',
        lambda s: bool(s.recipe) and s.section.dtype == "float32",
        "what is not in 8 bits is in bfloat16",
        'write dtype = "bfloat16"',
    ),
    Rule(
        "[model.fp8] before Hopper",
        lambda s: bool(s.recipe) and s.machine.capability < (8, 9),
        "the device has no 8-bit tensor cores",
        "leave [model.fp8] out",
    ),
    Rule(
        'model.fp8.recipe = "blockwise" before Hopper, or with CUDA before 12.9',
        lambda s: s.recipe == "blockwise" and (s.machine.capability < (9, 0) or (s.machine.cuda or (0, 0)) < (12, 9)),
        "cuBLASLt has products with scales of blocks from CUDA 12.9 on, and from Hopper on",
        'write recipe = "current"',
    ),
    Rule(
        'model.fp8.recipe = "mxfp8" before Blackwell',
        lambda s: s.recipe == "mxfp8" and s.machine.capability < (10, 0),
        "Hopper has no products of blocks of 32",
        'write recipe = "blockwise"',
    ),
    Rule(
        'model.fp8.recipe = "blockwise" with Transformer Engine before 2.3',
        lambda s: s.recipe == "blockwise" and s.kernels.fused and s.older("2.3"),
        "older versions do not know the recipe",
        "install 2.9 or newer",
    ),
    Rule(
        'model.fp8.recipe = "blockwise" or "mxfp8" with format = "hybrid"',
        lambda s: s.recipe in ("blockwise", "mxfp8") and s.section.fp8 is not None and s.section.fp8.format == "hybrid",
        "blocks have scales of their own, so that e4m3's range is enough (DeepSeek-V3 3.3.2), and e5m2 loses a bit",
        "leave `format` out",
    ),
    Rule(
        'model.fp8.recipe = "delayed" with layers in BF16',
        lambda s: s.recipe == "delayed" and _most_bf16(s) > 0,
        "largest numbers of all layers are exchanged together",
        'write recipe = "current", or no first_bf16_layers and last_bf16_layers',
    ),
    Rule(
        "model.fp8.first_bf16_layers or last_bf16_layers above num_hidden_layers / parallel.pipeline",
        lambda s: _most_bf16(s) * s.ranks("pipeline") > s.hf.get("num_hidden_layers", math.inf),
        "upstream keeps no more layers of an end in BF16 than a pipeline stage has",
        "write a smaller number, or less parallel.pipeline",
    ),
    Rule(
        'model.fp8.weight_gradients = false without recipe = "delayed"',
        lambda s: s.kernels.fp8 is not None and not s.kernels.fp8.weight_gradients and s.recipe != "delayed",
        "Transformer Engine has that switch for delayed scaling alone",
        "leave it out",
    ),
    Rule(
        'model.fp8.recipe = "delayed" with "layernorm" or "moe_act" recomputed',
        lambda s: s.recipe == "delayed" and s.recomputes("layernorm", "moe_act"),
        "the second forward pass would count the largest numbers twice",
        'write recipe = "current", or recompute other modules',
    ),
    Rule(
        'model.fp8.recipe = "delayed" with MTP layers and recompute = "full"',
        lambda s: s.recipe == "delayed" and s.mtp > 0 and s.section.memory.recompute == "full",
        "upstream (0.16.1) enters the MTP layer's second pass without the scales of the first",
        'write recipe = "current"',
    ),
    Rule(
        "model.kernels.grouped_gemm with plain torch's layers",
        lambda s: s["grouped_gemm"] and not s.kernels.fused,
        "the local grouped experts ask for another package, and upstream has removed them after 0.16",
        "leave it out",
    ),
    Rule(
        "fusions of Transformer Engine with plain torch's layers",
        lambda s: (
            not s.kernels.fused
            and (s["permute_fusion"] or s["router_fusion"] or s["rope_fusion"] or s["cross_entropy_fusion"] == "te")
        ),
        'permute_fusion, router_fusion, rope_fusion and cross_entropy_fusion = "te" are its kernels',
        "leave them out",
    ),
    Rule(
        "model.kernels.attention with plain torch's layers",
        lambda s: not s.kernels.fused and s["attention"] != "auto",
        "they have torch's scaled_dot_product_attention",
        "leave it out",
    ),
    Rule(
        'model.memory.recompute_modules "moe_act" without grouped_gemm',
        lambda s: s.recomputes("moe_act") and not s["grouped_gemm"],
        "only grouped experts have it in one place",
        'recompute "moe", or nothing of it',
    ),
    Rule(
        'model.kernels.cross_entropy_fusion = "native" with dtype = "float32"',
        lambda s: s["cross_entropy_fusion"] == "native" and s.section.dtype == "float32",
        "Megatron's rounds the gradient to bfloat16 (fused_cross_entropy.py:82)",
        'write "none"',
    ),
    Rule(
        "model.kernels.rope_fusion with multi-latent attention and plain rotary embeddings",
        lambda s: s["rope_fusion"] and "kv_lora_rank" in s.hf and not _yarn(s.hf),
        "upstream's kernel knows YaRN alone",
        "leave it out",
    ),
    Rule(
        'model.kernels.dispatcher = "deepep" or "hybridep" without expert parallelism',
        lambda s: _by_node(s) and s.ranks("expert") * s.ranks("expert_tensor") == 1,
        "there is nothing to exchange",
        'write parallel.expert > 1, or dispatcher = "alltoall"',
    ),
    Rule(
        'model.kernels.dispatcher = "deepep" or "hybridep" without the package',
        lambda s: _by_node(s) and not s.machine.deep_ep,
        "deep_ep cannot be imported",
        'build it (docs/h100.md), or write dispatcher = "alltoall"',
    ),
    Rule(
        'model.kernels.dispatcher = "deepep" with dtype = "float32"',
        lambda s: _by_node(s) and s.section.dtype == "float32",
        "its kernels carry 16-bit and 8-bit numbers",
        'write dtype = "bfloat16"',
    ),
    Rule(
        'model.kernels.shared_expert_overlap with dispatcher = "deepep" or "hybridep"',
        lambda s: s["shared_expert_overlap"] and _by_node(s),
        "the overlap is part of the all-to-all dispatcher",
        'write dispatcher = "alltoall", or overlap_expert_exchange = true instead',
    ),
    Rule(
        'model.kernels.shared_expert_overlap with "shared_experts" recomputed',
        lambda s: s["shared_expert_overlap"] and s.recomputes("shared_experts"),
        "they run on a stream of their own",
        "leave one of them out",
    ),
    Rule(
        "model.kernels.overlap_expert_exchange without experts on several ranks",
        lambda s: s["overlap_expert_exchange"] and (not s.experts or s.ranks("expert") == 1),
        "there is no exchange to hide",
        "write parallel.expert > 1, or leave it out",
    ),
    Rule(
        "model.kernels.overlap_expert_exchange with a pipeline of whole stages",
        lambda s: (
            s["overlap_expert_exchange"]
            and s.ranks("pipeline") > 1
            and (s.layout.get("virtual_pipeline_model_parallel_size") or 1) == 1
        ),
        "only the interleaved schedule has two microbatches at hand",
        "write parallel.virtual_pipeline > 1",
    ),
    Rule(
        "model.kernels.overlap_expert_exchange with plain torch's layers, or in float32",
        lambda s: s["overlap_expert_exchange"] and (not s.kernels.fused or s.section.dtype == "float32"),
        "it needs two CUDA streams, and 16-bit numbers",
        "leave it out",
    ),
    Rule(
        "model.kernels.overlap_expert_exchange with shared_expert_overlap",
        lambda s: s["overlap_expert_exchange"] and s["shared_expert_overlap"],
        "both would use the same time",
        "leave one of them out",
    ),
    Rule(
        'model.kernels.overlap_expert_exchange with recompute = "full", or "moe" recomputed',
        lambda s: s["overlap_expert_exchange"] and (s.section.memory.recompute == "full" or s.recomputes("moe")),
        "layers are taken apart, so that the exchange would come again in the backward pass",
        'recompute ["layernorm", "mla_up_proj", "moe_act"]',
    ),
    Rule(
        "model.kernels.overlap_expert_exchange with MTP layers on one pipeline stage, or with more than one",
        lambda s: s["overlap_expert_exchange"] and s.mtp > 0 and (s.mtp > 1 or s.ranks("pipeline") == 1),
        "upstream's schedule has one MTP layer on the last of several stages",
        "write parallel.pipeline > 1, or leave it out",
    ),
    Rule(
        "model.kernels.overlap_expert_exchange with a reward model or a critic",
        lambda s: s["overlap_expert_exchange"] and s.scalar,
        "upstream's schedule computes the vocabulary's loss",
        "leave it out",
    ),
    Rule(
        "model.kernels.delay_weight_gradient without overlap_expert_exchange",
        lambda s: s["delay_weight_gradient"] and not s["overlap_expert_exchange"],
        "nothing would compute what was put off",
        "write both, or neither",
    ),
    Rule(
        'model.kernels.cuda_graphs = "local" without a CUDA device',
        lambda s: _graphs(s) and s.machine.cuda is None,
        "there are no graphs to record",
        "leave it out",
    ),
    Rule(
        'model.kernels.cuda_graphs = "local" with experts',
        lambda s: _graphs(s) and s.experts > 0,
        "no token is dropped, so that every expert gets another number of tokens each time",
        "leave it out",
    ),
    Rule(
        'model.kernels.cuda_graphs = "local" with recompute = "full" or activation_offload',
        lambda s: _graphs(s) and (s.section.memory.recompute == "full" or bool(s["activation_offload"])),
        "copies and second passes are not recorded",
        "leave one of them out",
    ),
    Rule(
        "model.kernels.activation_offload without a CUDA device",
        lambda s: bool(s["activation_offload"]) and s.machine.cuda is None,
        "activations are in the host's memory already",
        "leave it out",
    ),
    Rule(
        'model.kernels.activation_offload with recompute = "full"',
        lambda s: bool(s["activation_offload"]) and s.section.memory.recompute == "full",
        "of a layer that is computed again nothing but its input is kept",
        'write recompute = "selective"',
    ),
    Rule(
        'model.kernels.activation_offload "attn_proj" without "core_attn"',
        lambda s: "attn_proj" in s["activation_offload"] and "core_attn" not in s["activation_offload"],
        "the input of the one is the output of the other, which attention's backward pass needs",
        'add "core_attn"',
    ),
    Rule(
        'model.kernels.activation_offload "expert_fc1" or "moe_act" without grouped_gemm',
        lambda s: bool({"expert_fc1", "moe_act"} & set(s["activation_offload"])) and not s["grouped_gemm"],
        "only grouped experts have it in one place",
        "leave them out",
    ),
]
"""[model]'s."""
