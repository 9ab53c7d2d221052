"""Import and export: nothing dropped, nothing invented, every mistake named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.build import BuiltModel, build_model, check_tokenizer
from megatron_r1.model.mapping import weights
from tests.model.conftest import section


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    return tmp_path


def test_round_trip_is_bitwise(built: BuiltModel, exported: Path) -> None:
    again = build_model(section(exported, load_weights=True), 128)
    ours, theirs = weights(built.module), weights(again.module)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_checkpoint_has_the_released_layout(exported: Path, built: BuiltModel) -> None:
    """Names and counts of the released checkpoint's layout, worked out for this size."""
    tensors = load_file(exported / "model.safetensors")
    experts, layers = built.hf["n_routed_experts"], built.hf["num_hidden_layers"]
    attention, dense, moe = 9, 3, 3 * experts + 3 + 2
    main = 3 + layers * attention + dense + (layers - 1) * moe
    mtp = attention + moe + 6
    assert len(tensors) == main + mtp
    assert tensors[f"model.layers.{layers}.eh_proj.weight"].shape == (64, 128)
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_untrained_mtp_layer_passes_through(exported: Path) -> None:
    policy = build_model(section(exported, load_weights=True, mtp_loss_coef=0.0), 128)
    assert policy.module.config.mtp_num_layers is None
    export = policy.export(torch.float32)
    assert [(name, spec.dtype, spec.shape) for name, spec in export.specs().items()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in export
    ]
    before, after = load_file(exported / "model.safetensors"), dict(policy.export(torch.float32))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_missing_tensor_is_named(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias"))
    with pytest.raises(DataError, match="e_score_correction_bias"):
        build_model(section(copy, load_weights=True), 128)


def test_unknown_tensor_is_named(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({"model.layers.0.surprise": torch.zeros(1)}))
    with pytest.raises(DataError, match="surprise"):
        build_model(section(copy, load_weights=True), 128)


def test_wrong_shape_is_named(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(DataError, match=r"model.norm.weight has shape \[3\].*\[64\]"):
        build_model(section(copy, load_weights=True), 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None}, "has no 'kv_lora_rank'"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"num_experts_per_tok": 2}, "must be 2 x topk_group"),
        ({"architectures": ["DeepseekV3ForCausalLn"]}, "did you mean 'DeepseekV3ForCausalLM'"),
        ({"architectures": []}, "names no architecture"),
    ],
)
def test_unusable_config_says_why(model_folder, changes: dict[str, object], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=message):
        build_model(section(model_folder(**changes)), 128)


def test_missing_weights_and_config(model_folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="load_weights = false"):
        build_model(section(model_folder(), load_weights=True), 128)
    with pytest.raises(DataError, match=r"config\.json"):
        build_model(section(tmp_path / "nowhere"), 128)


def test_lost_mtp_layer_and_long_context_are_refused(model_folder) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="neither train nor export"):
        build_model(section(mtp_loss_coef=0.0), 128)
    with pytest.raises(ConfigError, match="exceed max_position_embeddings 512"):
        build_model(section(), 513)


def test_tokenizer_must_fit(built: BuiltModel) -> None:
    check_tokenizer(built, 400, eos_id=2)
    with pytest.raises(ConfigError, match=r"401 tokens.*400"):
        check_tokenizer(built, 401, eos_id=2)
    with pytest.raises(ConfigError, match=r"token 7.*eos_token_id is 2"):
        check_tokenizer(built, 400, eos_id=7)
