"""Rollouts against sums worked by hand."""

import json
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import ModelSection
from megatron_r1.convert.target import HuggingFaceTarget
from megatron_r1.errors import ConfigError
from megatron_r1.model.memory import Shape
from megatron_r1.plan.engine_arguments import engine_of
from megatron_r1.plan.fleet import sent_bytes
from megatron_r1.plan.hardware import H100
from megatron_r1.plan.rollout import Decoding, Engine, Lengths, cache_bytes, cache_tokens, engine_weights
from megatron_r1.plan.tensors import count
from tools.header_checkpoint import Invented

V3 = json.loads((Path(__file__).parents[2] / "examples/deepseek_v3/model/config.json").read_text())
SHAPE = Shape.of(V3, ModelSection(path=Path(), mtp_loss_coef=0.0))
PARAMETERS = 671_026_419_200
COUNTS = count(SHAPE)


def test_a_token_of_deepseek_v3_takes_70_kb_on_every_rank() -> None:
    assert cache_bytes(SHAPE.config, Engine(1, 2.0, 1)) == cache_bytes(SHAPE.config, Engine(16, 2.0, 1)) == 70_272
    assert 576 * 61 * 2 == 70_272


def test_a_cache_is_what_weights_leave() -> None:
    room = cache_tokens(SHAPE, Engine(16, 1.0, 256), COUNTS, H100)
    assert room == pytest.approx((0.9 * 79.1 * 2**30 - 4 * 2**30 - PARAMETERS / 16) / 70_272, abs=1)
    assert cache_tokens(SHAPE, Engine(8, 2.0, 256), COUNTS, H100) < 0


def test_copies_of_attention_have_caches_of_their_own() -> None:
    """Each of 32 GPUs has all but the routed experts, and its share of these and of 32 more in each layer."""
    engine = Engine(32, 1.0, 256, copies=32, redundant=32)
    routed = 58 * 256 * 3 * 7168 * 2048
    held = PARAMETERS - 58 * 256 - routed + routed * 288 / 256 / 32
    assert engine_weights(SHAPE, engine, COUNTS) == pytest.approx(held)
    each = int((0.9 * 79.1 * 2**30 - 4 * 2**30 - held) / 70_272)
    assert cache_tokens(SHAPE, engine, COUNTS, H100) == 32 * each


def test_drafts_give_more_tokens_a_step() -> None:
    plain, drafting = (Decoding(SHAPE, Engine(32, 1.0, 256, drafted=drafts), H100) for drafts in (0, 1))
    slow, fast = (each.rollout([3700] * 64, 0, 10**7)[0] for each in (plain, drafting))
    assert slow / fast == pytest.approx(1.85 * 61 / 62, rel=0.03)


@pytest.mark.parametrize("spread", [0.0, 0.7, 1.2])
def test_lengths_have_the_mean(spread: float) -> None:
    lengths = Lengths(1000, spread, 4096).sample(501)
    assert sum(lengths) / 501 == pytest.approx(1000, rel=0.01)
    assert max(lengths) <= 4096


def test_equal_lengths_take_a_step_a_token() -> None:
    decoding = Decoding(SHAPE, Engine(16, 1.0, 64), H100)
    seconds, tail = decoding.rollout([320] * 8, 0, 10**6)
    assert tail == seconds  # all have begun at once
    assert 320 * decoding.step(8, 0) < seconds < 320 * decoding.step(8, 8 * 320)


def test_samples_that_find_no_place_wait() -> None:
    decoding = Decoding(SHAPE, Engine(16, 1.0, 4), H100)
    at_once, _ = decoding.rollout([320] * 4, 0, 10**6)
    two_rounds, tail = decoding.rollout([320] * 8, 0, 10**6)
    assert two_rounds == pytest.approx(2 * at_once)
    assert tail == pytest.approx(at_once)


def test_the_longest_decides() -> None:
    decoding = Decoding(SHAPE, Engine(16, 1.0, 256), H100)
    short, _ = decoding.rollout([512] * 64, 0, 10**6)
    one_long, tail = decoding.rollout([*[512] * 63, 4096], 0, 10**6)
    assert one_long == pytest.approx(short + 3584 * decoding.step(1, 2304), rel=0.05)
    assert tail == one_long


def test_a_step_reads_the_experts_that_it_touches() -> None:
    """One sample touches 8 of 256, 4,096 samples all of them."""
    few, many = (Decoding(SHAPE, Engine(1, 2.0, 1), H100).step(samples, 0) for samples in (1, 256))
    active = 36.6e9 * 2 / H100.memory_rate
    assert few == pytest.approx(active + 61 * H100.decode_layer["node"], rel=0.02)
    assert many == pytest.approx(2 * 670e9 / H100.memory_rate, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        ([], Engine(1, 2.0, 8)),
        (["--tensor-parallel-size=8"], Engine(8, 2.0, 8)),
        (["-tp", "4", "--data-parallel-size", "2"], Engine(8, 2.0, 8, copies=2)),
        (["--seed=7", "--enforce-eager"], Engine(1, 2.0, 8, eager=True)),
        (["--quantization=fp8", "--kv-cache-dtype=fp8"], Engine(1, 1.0, 8, cache=1.0)),
        (["--quantization=fp8_per_block"], Engine(1, 1.0, 8)),
        (["--gpu-memory-utilization=0.8"], Engine(1, 2.0, 8, memory=0.8)),
        (['--speculative-config={"method": "mtp", "num_speculative_tokens": 1}'], Engine(1, 2.0, 8, drafted=1)),
        (["--enable-eplb", '--eplb-config={"num_redundant_experts": 32}'], Engine(1, 2.0, 8, redundant=32)),
    ],
)
def test_arguments_say_what_an_engine_is(arguments: list[str], engine: Engine) -> None:
    assert engine_of(arguments, 8) == engine


def test_an_engine_that_starts_in_fp8() -> None:
    assert engine_of(["-tp=8"], 8, fp8=True) == Engine(8, 1.0, 8)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_the_bytes_of_a_push_are_those_of_a_checkpoint(in_fp8: bool, tmp_path: Path) -> None:
    """Of all tensors that `cast` would write of DeepSeek-V3, without its MTP layer."""
    target = HuggingFaceTarget(Invented(V3, tmp_path), torch.bfloat16, "float32" if in_fp8 else None, 2**60)
    (part,) = target.parts()
    size = sum(spec.nbytes for name, spec in target.specs(part).items() if not name.startswith("model.layers.61."))
    assert sent_bytes(SHAPE, in_fp8, COUNTS) == pytest.approx(size, rel=3e-4)


@pytest.mark.parametrize(
    ("argument", "text"), [("--tensor-parallel-size=two", "is no whole number"), ("--eplb-config={", "is no JSON")]
)
def test_arguments_that_say_nothing(argument: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        engine_of([argument], 8)
