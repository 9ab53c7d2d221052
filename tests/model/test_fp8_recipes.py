"""The FP8 recipes of training: the emulation against the formats' definitions, and what the papers say of them."""

import math

import pytest
import torch

from megatron_r1.model import fp8
from tests.model import fp8_recipes
from tests.model.fp8_recipes import E4M3, E5M2, RECIPES, WHOLE, Block, error, product, rounded

BLOCKS: list[Block] = [(1, 128), (128, 128), (1, 32), WHOLE]
STEP = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}
"""Half a step of a format: relative, among normal numbers, and absolute among subnormal ones."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("form", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("powers", [False, True])
def test_half_a_step_at_most(block: Block, form: torch.dtype, powers: bool) -> None:
    """Of blocks of any size, with numbers over 30 powers of two; scales by a loop over the blocks."""
    tensor = normal(150, 300) * torch.exp2(torch.randint(-20, 10, (150, 300)).double())
    found = rounded(tensor, block, form, powers)
    height, width = block if block != WHOLE else tensor.shape
    for i in range(0, tensor.size(0), height):
        for j in range(0, tensor.size(1), width):
            place = (slice(i, i + height), slice(j, j + width))
            part, scale = tensor[place], float(tensor[place].abs().max()) / torch.finfo(form).max
            scale = 2.0 ** math.ceil(math.log2(scale)) if powers else scale
            relative, absolute = STEP[form]
            bound = torch.maximum(part.abs() * relative, torch.tensor(scale * absolute)) * (1 + 2.0**-20)
            assert ((found[place] - part).abs() <= bound).all()


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_weights_of_a_checkpoint_are_rounded_alike(block: Block) -> None:
    """`model/fp8.py`, which works in float32."""
    tensor = normal(200, 384).float()
    expected = fp8.dequantize(*fp8.quantize(tensor, block), torch.float32, block)
    torch.testing.assert_close(rounded(tensor, block).float(), expected, rtol=2.0**-23, atol=0)


def test_zeros_and_saturation() -> None:
    assert torch.equal(rounded(torch.zeros(3, 5), (1, 2)), torch.zeros(3, 5).double())
    assert rounded(torch.tensor([[1000.0, 1.0]]), WHOLE, largest=448.0).tolist() == [[448.0, 1.0]]


@pytest.mark.parametrize("name", RECIPES)
def test_error_of_a_product(name: str) -> None:
    """Of well-behaved numbers, in all three products of a layer.

    e4m3 rounds a number, uniform between powers of two, by 2^-4 / sqrt(3) of the lower of them at most: 2.6 % in
    the mean. Two factors' errors add in squares; e5m2 has half as many numbers.
    """
    inputs, weight, gradient = normal(256, 512), normal(384, 512, seed=1), normal(256, 384, seed=2)
    recipe = RECIPES[name]
    plain, coarse = 0.026 * math.sqrt(2), 0.026 * math.sqrt(1 + 4)
    assert error(product(inputs, weight, recipe), inputs @ weight.t()) == pytest.approx(plain, rel=0.1)
    backward = plain if recipe.gradients is E4M3 else coarse
    found = fp8_recipes.input_gradient(gradient, weight, recipe)
    assert error(found, gradient @ weight) == pytest.approx(backward, rel=0.1)
    found = fp8_recipes.weight_gradient(gradient, inputs, recipe)
    assert error(found, gradient.t() @ inputs) == pytest.approx(backward, rel=0.1)


def test_an_outlier_costs_one_scale_its_precision() -> None:
    """Why V3 scales tiles: one activation of 10^6 pushes all others of its tensor below e4m3's smallest number."""
    inputs, weight = normal(256, 512), normal(384, 512, seed=1)
    inputs[7, 9] = 1e6
    others = [row for row in range(256) if row != 7]
    expected = (inputs @ weight.t())[others]
    errors = {name: error(product(inputs, weight, recipe)[others], expected) for name, recipe in RECIPES.items()}
    assert max(errors["blockwise"], errors["mxfp8"]) < 0.04
    assert errors["current"] > 0.9


def test_delayed_scaling_saturates_what_has_grown() -> None:
    """Its scale is that of earlier steps: what has doubled since is cut."""
    tensor = normal(64, 64)
    earlier = float(tensor.abs().max())
    kept, grown = (error(rounded(factor * tensor, WHOLE, largest=earlier), factor * tensor) for factor in (1, 4))
    assert kept < 0.03
    assert grown > 0.2


def accumulated(terms: torch.Tensor, bits: int, promote: int | None) -> torch.Tensor:
    """Sums over the last dimension, 32 terms at once, in a register of so many bits; every `promote` in full."""
    total, register = torch.zeros(terms.shape[:-1]).double(), torch.zeros(terms.shape[:-1]).double()
    for start in range(0, terms.size(-1), 32):
        register = register + terms[..., start : start + 32].sum(-1)
        mantissa, exponent = torch.frexp(register)
        register = torch.ldexp((mantissa * 2.0**bits).trunc() / 2.0**bits, exponent)
        if promote and (start + 32) % promote == 0:
            total, register = total + register, torch.zeros_like(register)
    return total + register


def test_accumulation_of_fourteen_bits() -> None:
    """DeepSeek-V3 3.3.2: Hopper's FP8 units keep about 14 bits of a sum; over K = 4096 that costs up to percents, and
    adding up in float32 after every 128 terms brings it down.

    All terms positive, so that a sum's error is not blown up by its terms cancelling.
    """
    terms = normal(64, 4096).abs() * normal(64, 4096, seed=1).abs()
    exact = terms.sum(-1)
    alone, promoted = ((accumulated(terms, 14, every) / exact - 1).abs().max() for every in (None, 128))
    assert promoted < 2.0**-12
    assert alone > 10 * promoted
