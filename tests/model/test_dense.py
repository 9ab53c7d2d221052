"""Llama, Qwen2 and Qwen3 against transformers: logits, gradients, tensors; and what config.json may not say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import DataError
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize
from tests.model.conftest import section
from tests.model.dense_models import MODELS, write_dense

ROWS, LENGTH = 2, 48


@dataclass
class Pair:
    """The same weights in both implementations."""

    folder: Path
    ours: BuiltModel
    theirs: PreTrainedModel


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    initialize(ParallelSection(), seed=0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_dense(folder, request.param)
    return Pair(folder, build_model(section(folder, load_weights=True), 128), theirs)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(120, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def cross_entropy(model: BuiltModel, tokens: torch.Tensor, packing: PackedSeqParams | None = None) -> torch.Tensor:
    positions = torch.arange(tokens.size(1) - 1).expand(tokens.size(0), -1)
    loss: torch.Tensor = model.module(tokens[:, :-1], positions, None, labels=tokens[:, 1:], packed_seq_params=packing)
    return loss


def logits(model: BuiltModel, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.size(1)).expand(tokens.size(0), -1)
    with torch.no_grad():
        output: torch.Tensor = model.module(tokens, positions, None)
    return output


def test_logits_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = pair.theirs(tokens).logits
    assert expected.std() > 0.3, "logits too flat to tell models apart"
    torch.testing.assert_close(logits(pair.ours, tokens), expected, atol=1e-4, rtol=0)


def test_gradients_equal_transformers(pair: Pair, tokens: torch.Tensor) -> None:
    pair.ours.module.zero_grad()
    cross_entropy(pair.ours, tokens).mean().backward()
    pair.theirs.zero_grad()
    F.cross_entropy(pair.theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    ours = {name: parameter.grad for name, parameter in pair.ours.module.named_parameters()}
    found = {
        name: gradient
        for rule in pair.ours.map.rules
        for name, gradient in zip(rule.hf, rule.cut(ours[rule.megatron]), strict=True)
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_round_trip_is_bitwise(pair: Pair) -> None:
    before = load_file(pair.folder / "model.safetensors")
    after = dict(pair.ours.map.export(pair.ours.module, torch.float32))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in before) is not bool(pair.ours.hf["tie_word_embeddings"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_packed_texts_do_not_see_one_another(pair: Pair, tokens: torch.Tensor) -> None:
    """Texts of 48, 20 and 31 tokens in one row, each as if it were alone."""
    lengths = [48, 20, 31]
    texts = [tokens[row % ROWS, : length + 1] for row, length in enumerate(lengths)]
    ends = torch.tensor([0, 48, 68, 99], dtype=torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=48, max_seqlen_kv=48
    )
    inputs, labels = (torch.cat([text[cut] for text in texts])[None] for cut in (slice(0, -1), slice(1, None)))
    positions = torch.arange(99)[None]
    with torch.no_grad():
        together = pair.ours.module(inputs, positions, None, labels=labels, packed_seq_params=packing)[0]
        alone = torch.cat([cross_entropy(pair.ours, text[None])[0] for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


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
    assert dict(model.map.export(model.module, torch.float32)).keys() == tensors.keys()
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
