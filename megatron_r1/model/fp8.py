"""DeepSeek's FP8 weights: e4m3 numbers and one float32 scale for each block of 128 x 128 (DeepSeek-V3 report, 3.3).

The scale is stored as `<weight>_scale_inv`; in spite of that name it is what the numbers are multiplied by.

What survives when a stored block (finite numbers q, scale s, m = max |q| > 0) is dequantised to bfloat16 and quantised
again to (q', s')? Roundings: q s to float32 (relative error 2^-24) and to bfloat16 (2^-8), amax / 448 and w / s' to
float32 (2^-24 each), and the last one to e4m3. From a number of e4m3 to the middle between it and a neighbour it is at
least 2^-5 of the number, so it comes back whenever all the rest is off by less. (s >= 2^-120 throughout, and 448 s
within bfloat16: what bfloat16 loses to underflow, 2^-134, is then small beside 2^-10 s, half a step at e4m3's low end.)

1. Bit for bit, where that is due:
   a. m = 448 and s = float32(a / 448) for a number a of bfloat16, which is what `quantize` makes of any block of
      bfloat16 (unless its scale is clamped). 448 s is a but for 2^-22, which the rounding to bfloat16 removes: amax is
      a again, s' = s, and q s / s' is q but for 2^-8 + 2^-22.
   b. m = 448 and any s: the bytes. s' is s but for 2^-8 + 2^-22 and q s / s' is q but for twice that. The scale itself
      can differ by so much: the amax from which it is made anew is a bfloat16.
   c. s a power of two and m > 224, with the scale format ue8m0: q s has 4 significant bits, so bfloat16 holds it, and
      s is the first power of two from m s / 448 on. If m <= 224, s' = s / 2^k and q' = 2^k q, which e4m3 holds too:
      scale and bytes differ, the values do not.
2. Elsewhere, and for any weight w: |q' s' - w| <= max(|w| / 16, s' / 1024) (1 + 2^-19), half a step of e4m3, where
   s' = max(amax / 448, 2^-126) but for 2^-24, in ue8m0 less than twice that. Of a stored block, amax / 448 is m s / 448
   but for 2^-8 + 2^-22. A block of zeros gets the scale 1, its numbers stay zeros of their sign.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Spec

SCALE_SUFFIX = "_scale_inv"
BLOCK = (128, 128)
LARGEST = 448.0
"""The largest number of e4m3."""

ScaleFormat = Literal["float32", "ue8m0"]
"""ue8m0: powers of two only (DeepSeek-V3.1), still stored as float32."""

_CACHED = 2**19  # numbers at once; their float32 and float16 stay in a core's caches
_ON_GPU = 2**26  # numbers at once, where each operation costs a launch
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_LINEAR = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"),
)
_QUANTIZED = tuple(f".{layer}.weight" for layer in _LINEAR)


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint stores this Hugging Face tensor in FP8: a linear layer of attention or of an MLP.

    Embeddings, the head, norms, routers and `eh_proj` of the MTP layer stay as they are.
    """
    return name.endswith(_QUANTIZED)


def quantization_config(scale_format: ScaleFormat = "float32", kept: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint's `config.json`.

    Args:
        scale_format: of its scales.
        kept: linear modules that are not in FP8, for architectures whose code does not know it (routers; the head).
    """
    config: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    if scale_format == "ue8m0":
        config["scale_fmt"] = scale_format
    if modules := list(kept):
        config["modules_to_not_convert"] = modules
    return config


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a weight: the number of blocks in each dimension, begun ones included.

    Raises:
        DataError: the weight is no matrix.
    """
    if len(shape) != 2:
        raise DataError(f"a weight of shape {list(shape)} has no scales: blocks are of a matrix's rows and columns")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def stored(name: str, shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> dict[str, Spec]:
    """The two tensors of a weight in FP8, by their names.

    Raises:
        DataError: as `scale_shape`.
    """
    scale = Spec(torch.float32, scale_shape(shape, block))
    return {name: Spec(torch.float8_e4m3fn, shape), name + SCALE_SUFFIX: scale}


def dequantize(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """e4m3 numbers times their block's scale, computed in float32 and rounded once to `dtype`.

    Beside the result it takes 3 MiB, or 10 bytes a column where that is more.

    Args:
        weight: e4m3. [rows, columns]
        scale_inv: float32. [rows / block rows, columns / block columns], rounded up
        dtype: of the result.
        block: rows and columns that share a scale.

    Raises:
        DataError: the scales do not fit the weight.
    """
    if scale_inv.shape != (expected := scale_shape(weight.shape, block)):
        raise DataError(
            f"scales of shape {list(scale_inv.shape)} do not fit a weight of {list(weight.shape)}: {list(expected)}"
        )
    result = torch.empty(weight.shape, dtype=dtype)
    rows = min(block[0], 1 + _CACHED // (1 + weight.size(1)))
    product = torch.empty(rows, weight.size(1), dtype=torch.float32)
    halves = None if _has_nan(weight) else torch.empty(product.shape, dtype=torch.int16)
    columns = min(block[1], weight.size(1))
    for index, scales in enumerate(scale_inv.float()):
        factor = scales.repeat_interleave(columns)[: weight.size(1)]
        stripe = slice(index * block[0], (index + 1) * block[0])
        for numbers, out in zip(weight[stripe].split(rows), result[stripe].split(rows), strict=True):
            out.copy_(_widen(numbers, halves, product[: numbers.size(0)]).mul_(factor))
    return result


def quantize(
    weight: torch.Tensor,
    block: tuple[int, int] = BLOCK,
    scale_format: ScaleFormat = "float32",
    name: str = "the weight",
    row: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers and their blocks' scales: scale = amax / 448, numbers rounded to nearest, ties to even.

    A block of zeros has scale 1. Beside the result it takes 8 bytes for each number of one row of blocks, on a GPU for
    2^26 numbers.

    Args:
        weight: [rows, columns]
        block: rows and columns that share a scale.
        scale_format: "ue8m0" rounds each scale up to a power of two.
        name: what an error calls the weight.
        row: of the whole weight, where `weight` is some rows of it; for errors.

    Returns:
        Numbers [rows, columns] in e4m3, scales [rows / block rows, columns / block columns] in float32.

    Raises:
        DataError: a weight is NaN or infinite.
    """
    device = weight.device
    scale = torch.empty(scale_shape(weight.shape, block), dtype=torch.float32, device=device)
    rows, columns = weight.shape
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
    step = _rows_at_once(block[0], columns, device)
    scratch = torch.empty(min(step, rows), columns, dtype=torch.float32, device=device)
    for first, stop in _stripes(rows, block[0], step):
        part = weight[first:stop].unflatten(0, (-1, min(block[0], stop - first)))  # [blocks, rows of one, columns]
        largest = F.pad(part.abs().amax(dim=1).float(), (0, -columns % block[1])).unflatten(1, (-1, block[1])).amax(2)
        if not largest.isfinite().all():
            raise DataError(f"{name} holds NaN or infinity between the rows {row + first} and {row + stop - 1}")
        scales = scale[first // block[0] :][: len(part)].copy_(_scale(largest, scale_format))
        quotient = scratch[: stop - first].copy_(weight[first:stop])
        quotient.view(part.shape).div_(scales.repeat_interleave(block[1], dim=1)[:, None, :columns])
        result[first:stop] = quotient  # at most 448 (1 + 2^-22), which rounds to 448: nothing to saturate
    return result, scale


def _rows_at_once(block: int, columns: int, device: torch.device) -> int:
    """One row of blocks on a CPU, many on a GPU."""
    return block if device.type == "cpu" else block * max(1, _ON_GPU // (block * max(1, columns)))


def _stripes(rows: int, block: int, step: int) -> Iterator[tuple[int, int]]:
    """Rows that are quantised at once: those of whole blocks, `step` at most, then those of the last, begun block."""
    whole = rows - rows % block
    yield from ((first, min(first + step, whole)) for first in range(0, whole, step))
    if whole < rows:
        yield whole, rows


def _scale(largest: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """Scales of blocks by their largest absolute value."""
    scale = (largest / LARGEST).clamp_min(_SMALLEST_SCALE)
    if scale_format == "ue8m0":
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # log2 would round
    return torch.where(largest > 0, scale, 1.0)


def _has_nan(weight: torch.Tensor) -> bool:
    """Whether an e4m3 byte is 0x7f or 0xff."""
    if not weight.numel():
        return False
    return bool(weight.view(torch.int8).max() == 0x7F) or bool(weight.view(torch.uint8).max() == 0xFF)


def _widen(numbers: torch.Tensor, halves: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """e4m3 to float32, ten times as fast as torch's own conversion, which goes number by number.

    Shifted left by 7, sign extended, the byte's exponent and mantissa stand where float16 has its own, the exponent
    being 8 too small (the biases are 7 and 15): float16 holds the number / 256, subnormals included, but not NaN.

    Args:
        numbers: e4m3. [rows, columns]
        halves: scratch, int16; None for torch's conversion, which knows NaN. [at least rows, columns]
        out: float32, also returned. [rows, columns]
    """
    if halves is None:
        return out.copy_(numbers)
    kept = -0x4080  # sign, 4 bits of exponent, 3 of mantissa
    shifted = halves[: numbers.size(0)].copy_(numbers.view(torch.int8)).mul_(0x80).bitwise_and_(kept)
    return out.copy_(shifted.view(torch.float16)).mul_(256.0)
