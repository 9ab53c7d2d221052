"""What Megatron keeps of a forward pass, and what it computes again."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from megatron_r1.config.recompute import MemorySection
from megatron_r1.errors import ConfigError


def memory_options(section: MemorySection) -> dict[str, Any]:
    """The part of every family's `TransformerConfig` that says what is computed again in the backward pass."""
    if section.recompute == "none":
        return {}
    if section.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(section.recompute_modules)}
    # MTP layers can be recomputed one by one only.
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def check_memory(section: MemorySection, hf: dict[str, Any]) -> None:
    """Raises `ConfigError` where `section` names modules that the model which `hf` describes does not have."""
    lacking = {
        "mla_up_proj": "kv_lora_rank" not in hf,
        "moe": not _experts(hf),
        "moe_act": not _experts(hf),
        "shared_experts": not hf.get("n_shared_experts"),
    }
    for name in section.recompute_modules:
        if lacking.get(name):
            raise ConfigError(f"model.memory.recompute_modules: {hf['architectures'][0]} has no {name}; drop it")


def _experts(hf: dict[str, Any]) -> int:
    return int(hf.get("n_routed_experts") or hf.get("num_experts") or hf.get("num_local_experts") or 0)


class MtpLayer(MultiTokenPredictionLayer):
    """Megatron's MTP layer, which can be computed again where sequences are packed.

    Upstream (0.16.1, multi_token_prediction.py:838; 0.19 does not) hands all arguments to the function that saves
    tensors for the backward pass, and `packed_seq_params` is none.
    """

    def _checkpointed_forward(self, forward: Callable[..., torch.Tensor], **arguments: Any) -> torch.Tensor:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}

        def again(*values: torch.Tensor) -> torch.Tensor:
            return forward(**arguments | dict(zip(tensors, values, strict=True)))

        result: torch.Tensor
        if self.config.fp8:  # restores the scales, too; what is not an argument by place would get no gradient
            group = parallel_state.get_tensor_model_parallel_group()
            result = te_checkpoint(again, False, get_cuda_rng_tracker, group, *tensors.values())
        else:
            result = checkpoint(again, False, *tensors.values())
        return result
