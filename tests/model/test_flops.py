"""Operations against torch's own count of a real model's, published figures, and sums worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.flops import Flops, flops_per_token, forward_flops, output_rows, whole_config
from megatron_r1.model.parallel import initialize
from megatron_r1.model.scalar_head import as_classifier
from tests.model.conftest import MODEL, section
from tests.model.dense_models import MODELS, SHAPE
from tests.model.moe_models import MOE_MODELS

ROWS, LENGTH = 2, 24
V3_SWITCHES = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}  # which transformers leaves out
NAMES = ("llama", "llama_tied", "qwen2", "qwen3", *MOE_MODELS)


def config_of(name: str) -> dict[str, Any]:
    """`config.json` of one of the tests' models, as transformers writes it."""
    config, model, own = (MODELS | MOE_MODELS)[name]
    written = json.loads(config(**{**SHAPE, **own}).to_json_string(use_diff=False))
    extra = V3_SWITCHES if model.__name__.startswith("DeepseekV3") else {}
    return written | extra | {"architectures": [model.__name__]}


def counted(folder: Path) -> tuple[float, float]:
    """What torch counts of a forward and of a backward pass, attention written out."""
    initialize(ParallelSection(), seed=0)
    module = build_model(section(folder, balance_loss_coef=0.0), 128).module.train()
    tokens = torch.randint(100, (ROWS, LENGTH))
    positions = torch.arange(LENGTH).expand_as(tokens)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = module(tokens, positions, None, labels=tokens).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def whole_square(hf: dict[str, Any]) -> float:
    """Ours of one forward pass, with the masked half of attention, which is multiplied out there."""
    config = whole_config(hf)
    ours = forward_flops(config, output_rows(hf), [LENGTH] * ROWS)
    mtp_scores = (config.mtp_num_layers or 0) * ours.attention_scores / config.num_layers
    return ours.total + ours.attention_scores + mtp_scores


@pytest.mark.parametrize("name", NAMES)
def test_every_family_against_torchs_counter(name: str, tmp_path: Path) -> None:
    hf = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    forward, backward = counted(tmp_path)
    assert forward == whole_square(hf)
    assert backward == 2 * forward


def test_mtp_and_latent_attention_against_torchs_counter() -> None:
    hf = json.loads((MODEL / "config.json").read_text())
    forward, backward = counted(MODEL)
    assert forward == whole_square(hf)
    assert backward == 2 * forward


def test_deepseek_v3_has_the_figures_that_are_published_of_it() -> None:
    """338 TFLOP/s at 1,297 tokens/s, 1,648 at 6,338 (Megatron-Bridge); without MTP 961 at 3,848."""
    hf = json.loads((Path(__file__).parents[1] / "convert/deepseek_v3.json").read_text())
    each = flops_per_token(hf, 4096)
    assert each.total / 1e9 == pytest.approx(260.64, abs=0.005)
    assert (each.total - each.mtp) / 1e9 == pytest.approx(250.45, abs=0.005)
    assert each.total == pytest.approx(338e12 / 1297, rel=2e-3)
    assert each.total - each.mtp == pytest.approx(961e12 / 3848, rel=4e-3)


def test_parts_of_deepseek_v3_by_hand() -> None:
    hf = json.loads((Path(__file__).parents[1] / "convert/deepseek_v3.json").read_text())
    each, h, heads = flops_per_token(hf, 4096), 7168, 128
    projections = h * 1536 + 1536 * heads * 192 + h * (512 + 64) + 512 * heads * (128 + 128) + heads * 128 * h
    expert = 3 * h * 2048
    layer = projections + heads * (192 + 128) * 4096 / 2 + 9 * expert + h * 256
    expected = Flops(
        attention_projections=6 * 61 * projections,
        attention_scores=6 * 61 * heads * (192 + 128) * 4096 / 2,
        dense_mlp=6 * 3 * 3 * h * 18432,
        routed_experts=6 * 58 * 8 * expert,
        shared_experts=6 * 58 * expert,
        router=6 * 58 * h * 256,
        head=6 * 129280 * h,
        mtp=6 * (2 * h * h + layer + 129280 * h),
    )
    assert vars(each) == pytest.approx(vars(expected))


def test_packed_texts_do_not_attend_to_one_another() -> None:
    hf = config_of("mixtral")
    config, rows = whole_config(hf), output_rows(hf)
    packed, one = forward_flops(config, rows, [10, 30]), forward_flops(config, rows, [40])
    assert packed == forward_flops(config, rows, [10]) + forward_flops(config, rows, [30])
    assert packed.attention_scores / one.attention_scores == pytest.approx((10**2 + 30**2) / 40**2)
    assert packed.total - packed.attention_scores == one.total - one.attention_scores


def test_a_scalar_head_is_one_row() -> None:
    hf = config_of("llama")
    scored = flops_per_token(as_classifier(hf), 32)
    assert scored.head == 6 * SHAPE["hidden_size"]
    assert scored.attention_scores == flops_per_token(hf, 32).attention_scores


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPT9"):
        flops_per_token({"architectures": ["GPT9ForCausalLM"]}, 32)
