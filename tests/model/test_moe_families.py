"""DeepSeek-V2 and V3, Qwen3-MoE and Mixtral against transformers; and what config.json may not say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import DataError
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from tests.model.agreement import Pair, gradients_agree, logits, logits_agree, packing_agrees
from tests.model.conftest import section
from tests.model.moe_models import MOE_MODELS, V2_YARN, write_moe


@pytest.fixture(scope="module", params=MOE_MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(120, (2, 49), generator=torch.Generator().manual_seed(1))


def load(folder: Path, name: str, **changes: Any) -> Pair:
    """The model as transformers writes it, read by ours."""
    initialize(ParallelSection(), seed=0)
    theirs = write_moe(folder, name, **changes)
    return Pair(folder, build_model(section(folder, load_weights=True, balance_loss_coef=0.0), 128), theirs)


def test_logits_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    logits_agree(pair, tokens)


def test_gradients_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    gradients_agree(pair, tokens)


def test_packed_texts_do_not_see_one_another(pair: Pair, tokens: torch.Tensor) -> None:
    packing_agrees(pair.ours, tokens)


def test_round_trip_is_bitwise(pair: Pair) -> None:
    before = load_file(pair.folder / "model.safetensors")
    after = dict(pair.ours.export(torch.float32))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("deepseek_v2_lite", "model.layers.1.self_attn.q_proj.weight", [6 * 28, 72]),
        ("deepseek_v2_lite", "model.layers.1.mlp.shared_experts.up_proj.weight", [2 * 24, 72]),
        ("deepseek_v2", "model.layers.0.self_attn.q_b_proj.weight", [6 * 28, 18]),
        ("moonlight", "model.layers.2.mlp.gate.e_score_correction_bias", [8]),
        ("moonlight", "model.layers.2.mlp.experts.7.down_proj.weight", [72, 24]),
        ("qwen3_moe", "model.layers.0.mlp.experts.7.gate_proj.weight", [24, 72]),
        ("qwen3_moe_some_dense", "model.layers.0.mlp.gate_proj.weight", [96, 72]),
        ("qwen3_moe_some_dense", "model.layers.1.mlp.gate.weight", [8, 72]),
        ("qwen3_moe_some_dense", "model.layers.3.mlp.gate_proj.weight", [96, 72]),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", [4, 72]),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", [72, 96]),
    ],
)
def test_names_are_those_of_the_released_checkpoints(tmp_path: Path, name: str, tensor: str, shape: list[int]) -> None:
    model = load(tmp_path, name).ours
    assert list(dict(model.export(torch.float32))[tensor].shape) == shape


def change(folder: Path, **values: Any) -> Path:
    """Rewrite keys of config.json (None = remove)."""
    file = folder / "config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in values}
    file.write_text(json.dumps(kept | {key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("name", "released"),
    [
        (
            "deepseek_v2_lite",
            {
                "rope_parameters": None,
                "rope_theta": 10000,
                "rope_scaling": {"type": "yarn", **{k: v for k, v in V2_YARN.items() if not k.startswith("rope_")}},
            },
        ),
        ("moonlight", {"rope_parameters": None, "rope_theta": 500.0, "rope_interleave": None}),
        ("qwen3_moe", {"rope_parameters": None, "rope_theta": 500.0, "num_local_experts": None, "num_experts": 8}),
        ("mixtral", {"rope_parameters": None, "rope_theta": 500.0, "head_dim": None}),
    ],
)
def test_config_as_released(tmp_path: Path, tokens: torch.Tensor, name: str, released: dict[str, Any]) -> None:
    """transformers 5 writes other keys than the published config.json has."""
    theirs = load(tmp_path, name).theirs
    ours = build_model(section(change(tmp_path, **released), load_weights=True, balance_loss_coef=0.0), 128)
    logits_agree(Pair(tmp_path, ours, theirs), tokens)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v2_lite", {"rope_parameters": V2_YARN | {"mscale_all_dim": 1.0}}),
        ("deepseek_v2", {"topk_group": 4}),
        ("deepseek_v2", {"routed_scaling_factor": 1.0}),
        ("deepseek_v3", {"topk_group": 4}),
        ("moonlight", {"routed_scaling_factor": 1.0}),
        ("moonlight", {"num_experts_per_tok": 2}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("mixtral", {"num_experts_per_tok": 1 + 2}),
    ],
)
def test_each_setting_matters(tmp_path: Path, tokens: torch.Tensor, name: str, changes: dict[str, Any]) -> None:
    """Otherwise equal logits would prove nothing about it."""
    theirs = load(tmp_path, name).theirs
    other = build_model(section(change(tmp_path, **changes), load_weights=True, balance_loss_coef=0.0), 128)
    with torch.no_grad():
        assert (logits(other, tokens) - theirs(tokens).logits).abs().max() > 1e-2


def test_latents_are_normalised_as_vllm_does(tmp_path: Path, tokens: torch.Tensor) -> None:
    """With rms_norm_eps, large here to tell; transformers takes 1e-6 for the latents, and is corrected here."""
    pair = load(tmp_path, "moonlight", rms_norm_eps=0.1)
    for layer in pair.theirs.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = 0.1
    logits_agree(pair, tokens)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "moonlight", "qwen3_moe", "mixtral"])
def test_balance_loss_only_where_asked(tmp_path: Path, name: str) -> None:
    def balancing(coefficient: float) -> tuple[str, float]:
        config = build_model(section(tmp_path, balance_loss_coef=coefficient), 128).module.config
        return config.moe_router_load_balancing_type, config.moe_aux_loss_coeff

    load(tmp_path, name)
    assert balancing(0.0) == ("none", 0.0)
    assert balancing(1e-3) == ("seq_aux_loss", 1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ("deepseek_v2_lite", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported"),
        ("deepseek_v2_lite", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported"),
        ("deepseek_v2_lite", {"n_group": 4}, "topk_group 1 of n_group 4 .* route differently"),
        ("deepseek_v2", {"num_experts_per_tok": 4}, "rank groups of experts by their best 2"),
        ("deepseek_v2_lite", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("deepseek_v2_lite", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ("deepseek_v2_lite", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type = 'linear'"),
        ("deepseek_v2_lite", {"rope_parameters": V2_YARN | {"truncate": False}}, "truncate = False is not supported"),
        ("deepseek_v2_lite", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9, but a layer has 8 experts"),
        ("moonlight", {"rope_interleave": False}, "rope_interleave = False is not supported"),
        ("moonlight", {"norm_topk_prob": False}, "norm_topk_prob = False is not supported"),
        ("moonlight", {"topk_method": None}, "has no 'topk_method'"),
        ("qwen3_moe", {"num_local_experts": None}, "has no 'num_experts'"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "leaves a router without gradient"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
        ("mixtral", {"rope_parameters": None}, "has no 'rope_theta'"),
    ],
)
def test_unusable_config_says_why(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    initialize(ParallelSection(), seed=0)
    write_moe(tmp_path, name)
    with pytest.raises(DataError, match=message):
        build_model(section(change(tmp_path, **changes), load_weights=True), 128)
