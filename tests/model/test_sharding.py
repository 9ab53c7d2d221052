"""Where tensors stand in a distributed checkpoint: names by hand from Transformer Engine's layer spec."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1.errors import DataError
from megatron_r1.model.build import rules
from megatron_r1.model.scalar_head import as_classifier
from megatron_r1.model.sharding import Piece, layout
from tests.model.dense_models import MODELS, SHAPE
from tests.model.moe_models import MOE_MODELS

TINY = Path(__file__).parents[2] / "examples/r1_tiny/model/config.json"


def config_of(name: str) -> dict[str, Any]:
    """A model's config.json."""
    if name == "r1_tiny":
        hf: dict[str, Any] = json.loads(TINY.read_text())
        return hf
    config, model_class, own = (MODELS | MOE_MODELS)[name]
    return {**config(**{**SHAPE, **own}).to_dict(), "architectures": [model_class.__name__]}


@pytest.mark.parametrize("name", ["auto", "load", "bf16"])
def test_dtype_that_is_none(name: str) -> None:
    with pytest.raises(DataError, match=f"torch_dtype = '{name}' is no dtype"):
        layout(config_of("r1_tiny") | {"torch_dtype": name})


# get_gpt_layer_with_transformer_engine_spec (gpt_layer_specs.py:181), multi_latent_attention: input_layernorm is
# TENorm; q and kv up-projections are TELayerNormColumnParallelLinear, which hold the norm before them as
# `layer_norm_weight`, and q_layernorm, kv_layernorm are IdentityOp; down-projections are plain TELinear. Each TE module
# has one `_extra_state`; TEDotProductAttention saves none (extensions/transformer_engine.py:1436).
LATENT_ATTENTION = {
    "input_layernorm": {"weight"},
    "self_attention.linear_proj": {"weight"},
    "self_attention.linear_q_down_proj": {"weight"},
    "self_attention.linear_q_up_proj": {"weight", "layer_norm_weight"},
    "self_attention.linear_kv_down_proj": {"weight"},
    "self_attention.linear_kv_up_proj": {"weight", "layer_norm_weight"},
}
# A dense layer: pre_mlp_layernorm is IdentityOp, linear_fc1 is TELayerNormColumnParallelLinear.
DENSE = {"mlp.linear_fc1": {"weight", "layer_norm_weight"}, "mlp.linear_fc2": {"weight"}}
# A mixture: pre_mlp_layernorm is TENorm; experts and shared experts have plain TE linear layers; the router is
# Megatron's own.
EXPERTS = {
    "pre_mlp_layernorm": {"weight"},
    "mlp.experts.experts.linear_fc1": {"weight"},
    "mlp.experts.experts.linear_fc2": {"weight"},
}
SHARED = {"mlp.shared_experts.linear_fc1": {"weight"}, "mlp.shared_experts.linear_fc2": {"weight"}}
# Other attention: input_layernorm is IdentityOp, linear_qkv is TELayerNormColumnParallelLinear, q_layernorm and
# k_layernorm are TENorm.
ATTENTION = {
    "self_attention.linear_qkv": {"weight", "layer_norm_weight"},
    "self_attention.linear_proj": {"weight"},
    "self_attention.q_layernorm": {"weight"},
    "self_attention.k_layernorm": {"weight"},
}
# get_mtp_layer_spec_for_backend (multi_token_prediction.py:424): three TENorm, one TEColumnParallelLinear, and the
# spec of the decoder's last layer.
MTP = {"enorm": {"weight"}, "hnorm": {"weight"}, "eh_proj": {"weight"}, "final_layernorm": {"weight"}}
R1_TINY = {
    "decoder.layers.0": LATENT_ATTENTION | DENSE,
    "decoder.layers.1": LATENT_ATTENTION | EXPERTS | SHARED,
    "decoder.layers.2": LATENT_ATTENTION | EXPERTS | SHARED,
    "decoder": {"final_layernorm": {"weight"}},
    "mtp.layers.0": MTP,
    # The MTP block asks its layers for plain states, too (multi_token_prediction.py:1150), and attention has one.
    "mtp.layers.0.transformer_layer": LATENT_ATTENTION | EXPERTS | SHARED | {"self_attention.core_attention": set()},
}
BIASED = {f"{layer}.mlp.router.{name}" for layer in (*list(R1_TINY)[1:3], "mtp.layers.0.transformer_layer")
          for name in ("weight", "expert_bias")}  # fmt: skip
# Layers that are all alike stand in one tensor, with the layers as its first axis (transformer_block.py:862).
QWEN3 = {"decoder.layers": ATTENTION | DENSE, "decoder": {"final_layernorm": {"weight"}}}
# Those that are listed as dense or mixed are not taken for alike (transformer_block.py:833).
QWEN3_MOE = {f"decoder.layers.{i}": ATTENTION | EXPERTS for i in range(2)} | {
    "decoder": {"final_layernorm": {"weight"}}
}
OUTSIDE = {"embedding.word_embeddings.weight", "output_layer.weight"}


@pytest.mark.parametrize(
    ("name", "modules", "others"),
    [
        ("r1_tiny", R1_TINY, OUTSIDE | BIASED),
        ("qwen3", QWEN3, OUTSIDE),
        ("qwen3_moe", QWEN3_MOE, OUTSIDE | {f"decoder.layers.{i}.mlp.router.weight" for i in range(2)}),
    ],
)
def test_names_are_those_of_transformer_engines_spec(
    name: str, modules: dict[str, dict[str, set[str]]], others: set[str]
) -> None:
    found = layout(config_of(name))
    expected = {f"{at}.{module}.{part}" for at, parts in modules.items() for module in parts for part in parts[module]}
    assert {piece.key for place in found.places.values() for piece in place.pieces} == expected | others
    states = {f"{at}.{module}._extra_state" for at, parts in modules.items() for module in parts}
    later = {state for state in states if "core_attention" in state}  # not any more in megatron-core 0.19
    assert states - later <= {key.split("/")[0] for key in found.objects} <= states


def test_an_object_for_each_expert_and_each_layer_of_those_that_share_a_name() -> None:
    tiny, qwen = layout(config_of("r1_tiny")).objects, layout(config_of("qwen3")).objects
    expert = "decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_"
    assert [key for key in tiny if key.startswith(expert)] == [f"{expert}{i}_8" for i in range(8)]
    attention = "decoder.layers.self_attention.linear_proj._extra_state/shard_"
    assert [key for key in qwen if key.startswith(attention)] == [f"{attention}{i}_2" for i in range(2)]
    assert len(set(qwen)) == len(qwen)


@pytest.mark.parametrize("name", ["r1_tiny", *MODELS, *MOE_MODELS])
def test_every_tensor_of_the_rules_has_a_place_and_the_places_fill_the_checkpoint(name: str) -> None:
    hf = config_of(name)
    places = layout(hf).places
    assert places.keys() == {rule.megatron for rule in rules(hf)}
    filled: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    corners = set()
    for place in places.values():
        assert sum(math.prod(piece.shape) for piece in place.pieces) == math.prod(place.shape)
        for piece in place.pieces:
            filled.setdefault((piece.key, piece.global_shape), []).append(math.prod(piece.shape))
            corners.add((piece.key, piece.offset))
    assert len({key for key, _ in filled}) == len(filled)
    assert all(sum(sizes) == math.prod(shape) for (_, shape), sizes in filled.items())
    assert len(corners) == sum(map(len, filled.values()))


def test_gate_and_up_of_an_expert_are_two_pieces() -> None:
    place = layout(config_of("r1_tiny")).places["decoder.layers.2.mlp.experts.local_experts.5.linear_fc1.weight"]
    key = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
    assert place.shape == (64, 64)
    assert place.pieces == (
        Piece(key, (8, 64, 64), (5, 0, 0), (1, 32, 64)),
        Piece(key, (8, 64, 64), (5, 32, 0), (1, 32, 64)),
    )


def test_switches_of_megatron_change_keys_but_not_names() -> None:
    plain = layout(config_of("qwen3"))
    layers = layout(config_of("qwen3"), {"non_homogeneous_layers": True})
    assert plain.places.keys() == layers.places.keys()
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    assert plain.places[name].pieces == (
        Piece("decoder.layers.self_attention.linear_proj.weight", (2, 72, 120), (1, 0, 0), (1, 72, 120)),
    )
    assert layers.places[name].pieces == (Piece(name, (72, 120), (0, 0), (72, 120)),)
    experts = layout(config_of("r1_tiny"), {"singleton_local_shards": True}).places
    assert [
        piece.key for piece in experts["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"].pieces
    ] == [
        "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight_w",
        "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight_v",
    ]


def test_dtypes_are_those_of_the_config_but_for_the_routers_bias() -> None:
    places = layout(config_of("r1_tiny") | {"torch_dtype": "bfloat16"}).places
    in_float32 = {name for name, place in places.items() if place.dtype == torch.float32}
    assert in_float32 == {key for key in BIASED if key.endswith("expert_bias")}
    assert {place.dtype for place in places.values()} == {torch.float32, torch.bfloat16}


def test_a_classifier_has_its_score_in_the_vocabularys_place() -> None:
    places = layout(as_classifier(config_of("r1_tiny"))).places
    assert places["output_layer.weight"].pieces == (Piece("output_layer.weight", (1, 64), (0, 0), (1, 64)),)
    assert not [name for name in places if name.startswith("mtp.")]


def test_nothing_of_it_stays() -> None:
    """No process group, no parallel state, no seed; and those that are there already are left alone."""
    were = dist.is_initialized(), parallel_state.model_parallel_is_initialized()
    random = torch.get_rng_state()
    layout(config_of("r1_tiny"))
    assert (dist.is_initialized(), parallel_state.model_parallel_is_initialized()) == were
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.empty(1).device.type == "cpu"
