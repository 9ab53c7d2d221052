"""Every key of [model.kernels] reaches the field of Megatron's config that it is for, and no other; without a GPU."""

import dataclasses
from typing import Any

import pytest
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.enums import AttnBackend
from packaging.version import Version

from megatron_r1.config.kernels import HOPPER
from megatron_r1.config.sections import ModelSection
from megatron_r1.model.kernels import Machine, choose, kernel_options
from tests.model.conftest import MODEL

H100 = Machine((13, 0), (9, 0), Version("2.11.0"), head_fusion=True, deep_ep=True)
NODE = {"moe_token_dispatcher_type": "flex"}
WRITTEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"attention": "fused"}, {"attention_backend": AttnBackend.fused}),
    ({"grouped_gemm": False}, {"moe_grouped_gemm": False}),
    ({"permute_fusion": False}, {"moe_permute_fusion": False}),
    ({"router_fusion": True}, {"moe_router_fusion": True}),
    ({"activation_fusion": False}, {"bias_dropout_fusion": False, "bias_activation_fusion": False}),
    ({"rope_fusion": True}, {"apply_rope_fusion": True}),
    ({"cross_entropy_fusion": "none"}, {"cross_entropy_loss_fusion": False}),
    ({"cross_entropy_fusion": "te"}, {"cross_entropy_fusion_impl": "te"}),
    ({"gradient_accumulation_fusion": False}, {"gradient_accumulation_fusion": False}),
    ({"dispatcher": "deepep"}, NODE | {"moe_flex_dispatcher_backend": "deepep"}),
    (
        {"dispatcher": "deepep", "dispatcher_sms": 24},
        NODE | {"moe_flex_dispatcher_backend": "deepep", "moe_deepep_num_sms": 24},
    ),
    ({"shared_expert_overlap": True}, {"moe_shared_expert_overlap": True}),
    ({"overlap_expert_exchange": True}, {"overlap_moe_expert_parallel_comm": True}),
    ({"delay_weight_gradient": True}, {"delay_wgrad_compute": True}),
    ({"cuda_graphs": "local"}, {"cuda_graph_impl": "local"}),
    (
        {"activation_offload": ["core_attn", "attn_proj"]},
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", "attn_proj"]},
    ),
]
"""[model.kernels] of a run file -> what it changes in Megatron's config on a Hopper GPU."""
OF_THE_WRAPPER = {"overlap_gradient_reduction"}
"""Not the model's: `tests/optim/test_optimizer.py`."""


def options(written: dict[str, Any]) -> dict[str, Any]:
    section = ModelSection.model_validate({"path": MODEL, "dtype": "bfloat16", "kernels": written})
    return kernel_options(choose(section, H100), H100)


@pytest.mark.parametrize(("written", "changed"), WRITTEN, ids=[str(written) for written, _ in WRITTEN])
def test_a_key_changes_its_own_field(written: dict[str, Any], changed: dict[str, Any]) -> None:
    before, found = options({}), options(written)
    assert {name: value for name, value in found.items() if before.get(name) != value} == changed
    assert before.keys() <= found.keys() <= {field.name for field in dataclasses.fields(MLATransformerConfig)}


def test_no_key_is_left_out() -> None:
    assert {name for written, _ in WRITTEN for name in written} == HOPPER.keys() - OF_THE_WRAPPER
