"""Llama, Qwen2 and Qwen3 against transformers: logits, gradients, tensors; and what config.json may not say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import DataError
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from tests.model.agreement import Pair, gradients_agree, logits, logits_agree, packing_agrees
from tests.model.conftest import section
from tests.model.dense_models import MODELS, write_dense

ROWS, LENGTH = 2, 48


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    initialize(ParallelSection(), seed=0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_dense(folder, request.param)
    return Pair(folder, build_model(section(folder, load_weights=True), 128), theirs)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(120, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def test_logits_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    logits_agree(pair, tokens)


def test_gradients_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    gradients_agree(pair, tokens)


def test_round_trip_is_bitwise(pair: Pair) -> None:
    before = load_file(pair.folder / "model.safetensors")
    after = dict(pair.ours.export(torch.float32))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in before) is not bool(pair.ours.hf["tie_word_embeddings"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_packed_texts_do_not_see_one_another(pair: Pair, tokens: torch.Tensor) -> None:
    packing_agrees(pair.ours, tokens)


def change(folder: Path, **values: Any) -> Path:
    """Rewrite keys of config.json (None = remove)."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_older_config_with_rope_theta_at_the_top(tmp_path: Path, tokens: torch.Tensor) -> None:
    initialize(ParallelSection(), seed=0)
    theirs = write_dense(tmp_path, "llama_scaled")
    scaling = dict(json.loads((tmp_path / "config.json").read_text())["rope_parameters"])
    change(tmp_path, rope_parameters=None, rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(
        logits(build_model(section(tmp_path, load_weights=True), 128), tokens), expected, atol=1e-4, rtol=0
    )


def test_scaling_matters(tmp_path: Path, tokens: torch.Tensor) -> None:
    """Otherwise `llama_scaled` above would prove nothing."""
    initialize(ParallelSection(), seed=0)
    theirs = write_dense(tmp_path, "llama_scaled")
    change(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = logits(build_model(section(tmp_path, load_weights=True), 128), tokens)
    assert (found - expected).abs().max() > 1e-3


def test_head_stored_beside_tied_embedding(tmp_path: Path) -> None:
    """Some checkpoints hold it again: accepted when it is the same, never written."""
    initialize(ParallelSection(), seed=0)
    write_dense(tmp_path, "qwen2_tied")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    model = build_model(section(tmp_path, load_weights=True), 128)
    assert dict(model.export(torch.float32)).keys() == tensors.keys()
    save_file(tensors | {"lm_head.weight": torch.zeros(120, 72)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head.weight differs.*tie_word_embeddings"):
        build_model(section(tmp_path, load_weights=True), 128)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("llama", {"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
        ("llama", {"num_key_value_heads": 4}, "6 attention heads do not divide by num_key_value_heads 4"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' is not supported"),
        (
            "llama_scaled",
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 2.0}},
            "low_freq_factor = 2.0 is not supported",
        ),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types\[1\] = 'sliding_attention'"),
        ("qwen3", {"head_dim": None}, "has no 'head_dim'"),
        ("llama", {"num_key_value_heads": 2}, r"q_proj.weight \+ .*shape \[144, 72\].*linear_qkv.*\[120, 72\]"),
    ],
)
def test_unusable_config_says_why(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    initialize(ParallelSection(), seed=0)
    write_dense(tmp_path, name)
    with pytest.raises(DataError, match=message):
        build_model(section(change(tmp_path, **changes), load_weights=True), 128)
