"""DeepSeek's FP8 blocks against numbers worked out here, and what survives a round trip."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.errors import DataError
from megatron_r1.model import fp8

BYTES = torch.arange(256, dtype=torch.uint8)
FINITE = BYTES[(BYTES & 0x7F) != 0x7F]
LOW = 2.0**-120
HIGH = 2.0**118


def number(byte: int) -> float:
    """e4m3 by its definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, one NaN of each sign."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array([number(byte) for byte in range(256)])


def nearest(value: float) -> int:
    """The byte next to a value, the even one of two."""
    distance = [abs(NUMBERS[byte] - abs(value)) for byte in range(127)]
    best = min(distance)
    byte = min((byte for byte in range(127) if distance[byte] == best), key=lambda byte: byte & 1)
    return byte | (0x80 if math.copysign(1, value) < 0 else 0)


def to_bfloat16(value: np.float32) -> float:
    """Rounded to nearest even in the upper half of its bits."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def slow_quantize(weight: np.ndarray, block: tuple[int, int], ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """One number after the other."""
    rows, columns = weight.shape
    result = np.zeros((rows, columns), dtype=np.uint8)
    scales = np.zeros((math.ceil(rows / block[0]), math.ceil(columns / block[1])), dtype=np.float32)
    for i, j in np.ndindex(scales.shape):
        place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        largest = np.abs(weight[place]).max()
        scale = np.maximum(np.float32(largest) / np.float32(448), np.float32(2.0**-126))
        if ue8m0:
            scale = np.float32(min(2.0**k for k in range(-126, 128) if 2.0**k >= float(scale)))
        scales[i, j] = scale if largest > 0 else 1
        result[place] = np.vectorize(lambda value, scale=scales[i, j]: nearest(float(np.float32(value) / scale)))(
            weight[place]
        )
    return result, scales


def e4m3(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.uint8).view(torch.float8_e4m3fn)


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def all_bytes(columns: int) -> torch.Tensor:
    """Every finite number once in each column, a column being a block. [254, columns]"""
    return FINITE[:, None].expand(-1, columns).contiguous().view(torch.float8_e4m3fn)


COLUMN = (len(FINITE), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_byte_is_the_number_of_its_definition(dtype: torch.dtype) -> None:
    """With NaN, where torch converts, and without, where the bits are shifted."""
    expected = torch.tensor(NUMBERS).to(dtype)
    assert torch.equal(
        fp8.dequantize(e4m3(BYTES)[None], torch.ones(1, 2), dtype)[0].nan_to_num(7), expected.nan_to_num(7)
    )
    finite = (BYTES & 0x7F) != 0x7F
    result = fp8.dequantize(e4m3(FINITE)[None], torch.ones(1, 2), dtype)[0]
    assert torch.equal(result, expected[finite])
    assert torch.equal(result.signbit(), expected[finite].signbit())


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-126, 1.0e-3, 1 / 3, 3.0e38])
def test_dequantize_rounds_once_from_float32(scale: float) -> None:
    with np.errstate(over="ignore"):
        products = [np.float32(NUMBERS[byte]) * np.float32(scale) for byte in FINITE.tolist()]
        expected = torch.tensor([to_bfloat16(product) for product in products])
    result = fp8.dequantize(e4m3(FINITE)[None], torch.full((1, 2), scale))
    assert torch.equal(result[0].float(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 300), (576, 129), (127, 7), (0, 5), (5, 0)])
@pytest.mark.parametrize("with_nan", [False, True])
def test_blocks_of_any_shape(shape: tuple[int, int], with_nan: bool) -> None:
    """Against one multiplication with the scales spread out."""
    generator = torch.Generator().manual_seed(0)
    weight = FINITE[torch.randint(len(FINITE), shape, generator=generator)]
    if with_nan and weight.numel():
        weight[-1, -1] = 0xFF
    scale = torch.rand(fp8.scale_shape(shape), generator=generator)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    expected = torch.tensor(NUMBERS[weight.numpy()], dtype=torch.float32) * spread
    assert torch.equal(fp8.dequantize(e4m3(weight), scale).nan_to_num(), expected.bfloat16().nan_to_num())


def test_wide_weights_are_cut_into_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = e4m3(torch.randint(0x7F, (300, 260))), torch.rand(3, 3)
    whole = fp8.dequantize(weight, scale)
    monkeypatch.setattr(fp8, "_CACHED", 1000)
    assert torch.equal(fp8.dequantize(weight, scale), whole)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_like_a_loop_over_numbers(ue8m0: bool, dtype: torch.dtype) -> None:
    """Sizes from float32's subnormals to its largest, middles between two numbers included."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, 23, generator=generator) * torch.logspace(-46, 37, 23)
    weight[:, 3] *= torch.tensor(NUMBERS[:9] + NUMBERS[1:10], dtype=torch.float32)
    weight[4:8, 10:15] = 0
    weight[0:4, 15:20] = torch.tensor([448.0, 232, 2.0**-10, -(2.0**-10), 3 * 2.0**-10]) / 448
    weight = weight.to(dtype)
    numbers, scales = fp8.quantize(weight, (4, 5), "ue8m0" if ue8m0 else "float32")
    expected, expected_scales = slow_quantize(weight.float().numpy(), (4, 5), ue8m0)
    assert torch.equal(scales, torch.tensor(expected_scales))
    assert torch.equal(numbers.view(torch.uint8), torch.tensor(expected))


def test_quantize_takes_views_and_partial_blocks() -> None:
    weight = torch.randn(200, 300).bfloat16()
    numbers, scales = fp8.quantize(weight.t())
    assert (numbers.shape, scales.shape) == ((300, 200), (3, 2))
    for i, j in np.ndindex(3, 2):
        place = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        part, scale = fp8.quantize(weight.t()[place])
        assert same_bytes(numbers[place].contiguous(), part)
        assert torch.equal(scales[i : i + 1, j : j + 1], scale)


@pytest.mark.parametrize("at_once", [2, 3, 1000])
@pytest.mark.parametrize("rows", [640, 700, 90])
def test_rows_of_blocks_that_are_quantised_at_once(monkeypatch: pytest.MonkeyPatch, rows: int, at_once: int) -> None:
    """Many on a GPU, one on a CPU: the same bits, and the weight stays as it was."""
    weight = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows))
    kept, (numbers, scales) = weight.clone(), fp8.quantize(weight)
    monkeypatch.setattr(fp8, "_rows_at_once", lambda block, columns, device: at_once * block)
    again, again_scales = fp8.quantize(weight)
    assert same_bytes(again, numbers)
    assert torch.equal(again_scales, scales)
    assert torch.equal(weight, kept)


def test_zeros_keep_their_sign_and_get_scale_1() -> None:
    numbers, scale = fp8.quantize(torch.tensor([[0.0, -0.0]]))
    assert (numbers.view(torch.uint8).tolist(), scale.tolist()) == ([[0, 0x80]], [[1.0]])
    empty, none = fp8.quantize(torch.empty(0, 3))
    assert (tuple(empty.shape), tuple(none.shape)) == ((0, 3), (0, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(200, 200, dtype=dtype)
    weight[130, 150] = bad
    with pytest.raises(DataError, match=r"o_proj.weight holds NaN or infinity between the rows 128 and"):
        fp8.quantize(weight, name="model.layers.0.self_attn.o_proj.weight")


def test_claim_1a_every_scale_that_a_bfloat16_block_can_have() -> None:
    """All 30,000 normal bfloat16 numbers as amax, every byte under each."""
    amax = torch.arange(0x8000, dtype=torch.int16).view(torch.bfloat16).float()
    amax = amax[(amax >= 448 * LOW) & amax.isfinite()]
    assert len(amax) > 29_000
    numbers, scale = all_bytes(len(amax)), amax[None] / 448
    again, scale_again = fp8.quantize(fp8.dequantize(numbers, scale, block=COLUMN), COLUMN)
    assert torch.equal(scale_again, scale)
    assert same_bytes(again, numbers)


@settings(max_examples=60)
@given(st.data())
def test_claim_1a_what_quantize_makes_of_bfloat16_stays(data: st.DataObject) -> None:
    """Blocks drawn number by number: quantised twice is quantised once."""
    weight = torch.tensor([data.draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=12, max_size=12))])
    weight = weight.view(3, 4).bfloat16()
    numbers, scale = fp8.quantize(weight, (2, 2))
    again, scale_again = fp8.quantize(fp8.dequantize(numbers, scale, block=(2, 2)), (2, 2))
    due = (scale >= LOW).repeat_interleave(2, 0)[:3].repeat_interleave(2, 1)
    assert torch.equal(scale_again[scale >= LOW], scale[scale >= LOW])
    assert torch.equal(again.view(torch.uint8)[due], numbers.view(torch.uint8)[due])


def test_claim_1b_bytes_stay_under_any_scale() -> None:
    """100,000 mantissas at random exponents; the scale moves by bfloat16's half step at most."""
    generator = torch.Generator().manual_seed(2)
    exponent = torch.randint(-119, 117, (1, 100_000), generator=generator)
    scale = torch.ldexp(1 + torch.rand(1, 100_000, generator=generator), exponent)
    numbers = all_bytes(100_000)[::7]
    numbers[0] = 448.0
    block = (len(numbers), 1)
    again, scale_again = fp8.quantize(fp8.dequantize(numbers, scale, block=block), block)
    assert same_bytes(again, numbers)
    error = (scale_again.double() / scale.double() - 1).abs().max().item()
    assert 2.0**-9 < error <= 2.0**-8 + 2.0**-22


def test_claim_1c_every_power_of_two_and_every_largest_number() -> None:
    """Every finite byte up to each largest number, under every scale."""
    scale = torch.exp2(torch.arange(-120, 119, dtype=torch.float64)).float()
    for largest in range(1, 127):
        magnitude = FINITE & 0x7F
        numbers = FINITE[magnitude <= largest]
        block = (len(numbers), 1)
        stored = numbers[:, None].expand(-1, len(scale)).contiguous().view(torch.float8_e4m3fn)
        values = fp8.dequantize(stored, scale[None], block=block)
        again, scale_again = fp8.quantize(values, block, "ue8m0")
        assert torch.equal(fp8.dequantize(again, scale_again, block=block), values)
        if NUMBERS[largest] > 224:
            assert same_bytes(again, stored)
            assert torch.equal(scale_again[0], scale)


def test_outside_the_claims_bytes_do_change() -> None:
    """Else the conditions would say nothing."""
    numbers, scale = torch.tensor([[440.0, 300, 3]]).to(torch.float8_e4m3fn), torch.tensor([[0.3]])
    numbers[0, 0] = 416
    again, scale_again = fp8.quantize(fp8.dequantize(numbers, scale))
    assert scale_again < scale * 0.95
    assert not same_bytes(again, numbers)


def within_bound(weight: torch.Tensor, scale_format: fp8.ScaleFormat, block: tuple[int, int]) -> None:
    """Claim 2, in float64."""
    numbers, scale = fp8.quantize(weight, block, scale_format)
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    spread = spread[: weight.size(0), : weight.size(1)].double()
    exact = weight.double()
    bound = torch.maximum(exact.abs() / 16, spread / 1024) * (1 + 2.0**-19)
    assert ((numbers.double() * spread - exact).abs() <= bound).all()
    padded = torch.zeros(len(scale) * block[0], scale.size(1) * block[1], dtype=torch.float64)
    padded[: weight.size(0), : weight.size(1)] = exact.abs()
    amax = padded.view(len(scale), block[0], -1, block[1]).amax((1, 3))
    due = torch.where(amax > 0, (amax / 448).clamp_min(2.0**-126), 1)
    ratio = scale.double() / due
    if scale_format == "float32":
        assert ((ratio - 1).abs() <= 2.0**-24).all()
    else:
        assert ((ratio >= 1 - 2.0**-24) & (ratio < 2)).all()
        assert (torch.frexp(scale).mantissa == 0.5).all()


@settings(max_examples=200)
@given(
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=12, max_size=12),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["float32", "ue8m0"]),
)
def test_claim_2_blocks_of_any_numbers(values: list[float], dtype: torch.dtype, scale_format: fp8.ScaleFormat) -> None:
    within_bound(torch.tensor(values).view(3, 4).to(dtype), scale_format, (2, 3))


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_claim_2_blocks_made_to_hurt(dtype: torch.dtype, scale_format: fp8.ScaleFormat) -> None:
    """Middles between numbers and their float32 neighbours, subnormals of both formats, one outlier over dust."""
    middles = torch.tensor((NUMBERS[:126] + NUMBERS[1:127]) / 2, dtype=torch.float32)
    middles = torch.cat([middles, torch.nextafter(middles, torch.zeros(())), torch.nextafter(middles, middles * 2)])
    middles[-1] = 448
    for exponent in (-149, -140, -133, -126, -124, -118, -20, -3, 0, 60, 117):
        for factor in (1.0, 1.001, 1.75, 1.999):
            row = middles.double() * factor * 2.0**exponent
            within_bound(row.to(dtype)[None], scale_format, (1, 1000))
            outlier = torch.cat([row, torch.tensor([float(row.max()) * 5000]).clamp_max(2.0**126)])
            within_bound(outlier.to(dtype)[None], scale_format, (1, 1000))


def test_scales_must_fit_the_weight() -> None:
    with pytest.raises(DataError, match=r"\[1, 2\] do not fit a weight of \[129, 129\]: \[2, 2\]"):
        fp8.dequantize(e4m3(torch.zeros(129, 129)), torch.ones(1, 2))
    with pytest.raises(DataError, match="no scales"):
        fp8.quantize(torch.zeros(3))


def test_what_a_released_checkpoint_has_in_fp8() -> None:
    """The tensors of DeepSeek-V3's README_WEIGHTS and of its header: layer 61 is the MTP layer."""
    layer = "model.layers.61."
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    linear = [f"{layer}self_attn.{name}.weight" for name in attention]
    for mlp in ("mlp", "mlp.experts.255", "mlp.shared_experts"):
        linear += [f"{layer}{mlp}.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert all(map(fp8.is_quantized, linear))
    kept = ["input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "mlp.gate", "eh_proj", "enorm"]
    kept = [f"{layer}{name}.weight" for name in [*kept, "embed_tokens", "shared_head.head", "shared_head.norm"]]
    others = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ]
    others.append(f"{layer}mlp.gate.e_score_correction_bias")
    assert not any(map(fp8.is_quantized, kept + others))


def test_config_entry() -> None:
    """As in the released config.json files of V3 and V3.1."""
    v3 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert fp8.quantization_config() == v3
    assert fp8.quantization_config("ue8m0") == v3 | {"scale_fmt": "ue8m0"}
    assert fp8.quantization_config(kept=["lm_head"])["modules_to_not_convert"] == ["lm_head"]
