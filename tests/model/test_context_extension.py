"""A model whose context is extended by YaRN, against transformers' DeepseekV3ForCausalLM and worked numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_r1.config.context_extension import ContextSection
from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.context_extension import extended
from megatron_r1.model.parallel import initialize
from tests.model.agreement import Pair, logits, logits_agree
from tests.model.conftest import section
from tests.model.moe_models import write_moe

PRETRAINED = {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "max_position_embeddings": 4096, "rope_theta": 10000}


def pretrained(folder: Path, released: bool) -> dict[str, Any]:
    """A model with a context of 64, saved by transformers; its config as released checkpoints write theirs or as is."""
    initialize(ParallelSection(), seed=0)
    write_moe(folder, "deepseek_v3", **PRETRAINED)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if released:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("released", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_an_extended_model_is_transformers(tmp_path: Path, released: bool) -> None:
    """200 tokens in a context of 64 extended to 256 and then to 512, both with factor 8; from the run file on."""
    config = pretrained(tmp_path, released)
    tokens = torch.randint(120, (2, 200), generator=torch.Generator().manual_seed(1))
    before = logits(build_model(section(tmp_path, load_weights=True, balance_loss_coef=0.0), 64), tokens)
    for context in (256, 512):
        longer = ContextSection(max_position_embeddings=context, factor=8.0)
        ours = build_model(section(tmp_path, load_weights=True, balance_loss_coef=0.0, context=longer), context)
        assert ours.hf == extended(config, longer)
        config = ours.hf
        (tmp_path / "config.json").write_text(json.dumps(config))  # as the run's export does
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert theirs.config.max_position_embeddings == context
        logits_agree(Pair(tmp_path, ours, theirs), tokens)
        assert (logits(ours, tokens) - before).abs().max() > 0.1, "the scaling changes nothing"


def test_two_phases_scale_alike() -> None:
    """DeepSeek-V3, 4.3: 32 K, then 128 K, with the same numbers of YaRN; in the end the published config.json."""
    first = extended(V3, ContextSection(max_position_embeddings=32768))
    second = extended(first, ContextSection(max_position_embeddings=131072))
    assert (first["max_position_embeddings"], second["max_position_embeddings"]) == (32768, 131072)
    assert first["rope_scaling"] == second["rope_scaling"]
    released = Path(__file__).parents[1] / "convert/deepseek_v3.json"
    assert second["rope_scaling"] == json.loads(released.read_text())["rope_scaling"]
    assert second["rope_theta"] == 10000
    assert V3["max_position_embeddings"] == 4096


def test_numbers_of_deepseek_v3(tmp_path: Path) -> None:
    """At its head sizes: frequencies 0-10 stay, 23-31 are a fortieth; softmax's scale is 192^-1/2 (0.1 ln 40 + 1)^2."""
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    pretrained(tmp_path, released=True)
    config = json.loads((tmp_path / "config.json").read_text()) | heads | {"max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    longer = ContextSection(max_position_embeddings=32768)
    attention = build_model(section(tmp_path, context=longer), 32768).module.decoder.layers[0].self_attention
    assert attention.softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192), rel=1e-9)
    assert attention.softmax_scale == pytest.approx(0.135234, abs=5e-7)
    angles, scale = attention.rotary_pos_emb(2)
    plain = [10000 ** (-2 * i / 64) for i in range(32)]
    ratios = [float(angle) / frequency for angle, frequency in zip(angles[1, 0, 0, :32], plain, strict=True)]
    assert scale == 1.0
    assert ratios[:11] == pytest.approx([1.0] * 11, rel=1e-5)
    assert ratios[23:] == pytest.approx([1 / 40] * 9, rel=1e-5)
    assert all(1 / 40 < ratio < 1 for ratio in ratios[11:23])


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({}, {"max_position_embeddings": 2048}, "shorter than the model's context, 4096"),
        ({}, {"max_position_embeddings": 32768, "factor": 4.0}, "more than factor 4 times the original"),
        ({"architectures": ["LlamaForCausalLM"]}, {"max_position_embeddings": 8192}, "LlamaForCausalLM does not have"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], context: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extended(V3 | changes, ContextSection(**context))
