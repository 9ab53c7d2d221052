"""FP8 kernels against float64 and against what their recipe itself rounds (`tests/model/fp8_recipes.py`)."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.model import fp8
from tests.gpu.small import needs_fused, needs_real_gpu
from tests.model.fp8_recipes import RECIPES, Recipe, error, input_gradient, product, weight_gradient

pytestmark = needs_real_gpu
ROWS, COLUMNS, K = 512, 768, 1024
ADDED = 1.05
"""What kernels may add to the error of the format itself: rounded results, and sums of fewer bits than float32."""
KERNEL = 0.01
"""Largest difference between a kernel and the emulation; the format's own error is 0.037."""
Record = Callable[[str, object], None]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    """bfloat16, with a few activations a thousand times the others."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(*shape, generator=generator)
    found[::97, ::89] *= 1000 if seed == 0 else 1
    return found.bfloat16().cuda()


def held(found: torch.Tensor, exact: torch.Tensor, emulated: torch.Tensor) -> dict[str, float]:
    """Both errors, which must be within their bounds."""
    figures = {"float64": error(found, exact), "emulated": error(found, emulated), "format": error(emulated, exact)}
    assert figures["emulated"] < KERNEL, figures
    assert figures["float64"] <= ADDED * figures["format"] + 0.002, figures
    return figures


@needs_fused
@pytest.mark.parametrize("name", RECIPES)
def test_transformer_engine(name: str, record_property: Record) -> None:
    """All three products of a linear layer. The second pass counts: the delayed recipe's scale is the first's."""
    from transformer_engine.pytorch import Linear, fp8_autocast

    if name == "mxfp8" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("MXFP8 needs Blackwell")
    inputs, gradient = drawn(ROWS, K, seed=0), drawn(ROWS, COLUMNS, seed=2)
    layer = Linear(K, COLUMNS, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(drawn(COLUMNS, K, seed=1))
    for _ in range(2):
        leaf = inputs.clone().requires_grad_()
        layer.zero_grad()
        with fp8_autocast(enabled=True, fp8_recipe=engine_recipe(name)):
            output = layer(leaf)
        output.backward(gradient)
    recipe = as_engine_scales(RECIPES[name])
    x, w, g = inputs.double(), layer.weight.detach().double(), gradient.double()
    figures = {
        "output": held(output, x @ w.t(), product(x, w, recipe)),
        "input gradient": held(leaf.grad, g @ w, input_gradient(g, w, recipe)),
        "weight gradient": held(layer.weight.grad, g.t() @ x, weight_gradient(g, x, recipe)),
    }
    record_property(f"errors, {name}", figures)


def engine_recipe(name: str) -> object:
    from transformer_engine.common import recipe as recipes

    made = {
        "blockwise": recipes.Float8BlockScaling,
        "current": recipes.Float8CurrentScaling,
        "delayed": recipes.DelayedScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }
    return made[name]()


def as_engine_scales(recipe: Recipe) -> Recipe:
    """Its blocks have scales that are powers of two unless a variable says otherwise."""
    plain = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES") == "1"
    return replace(recipe, powers=recipe.powers or (recipe.inputs == (1, 128) and not plain))


def test_torch_in_blocks(record_property: Record) -> None:
    """cuBLAS by way of torch, on the numbers and scales of our own quantisation: no Transformer Engine is needed."""
    inputs, weight = drawn(ROWS, K, seed=0), drawn(COLUMNS, K, seed=1)
    numbers, scales = fp8.quantize(inputs.cpu(), (1, 128))
    weights, weight_scales = fp8.quantize(weight.cpu())
    padded = F.pad(weight_scales, (0, -weight_scales.size(1) % 4))
    blocks = F.ScalingType
    output = F.scaled_mm(
        numbers.cuda(), weights.cuda().t(),
        scales.cuda().t().contiguous().t(), blocks.BlockWise1x128, padded.cuda().t(), blocks.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    x, w = inputs.double(), weight.double()
    record_property("errors", held(output, x @ w.t(), product(x, w, RECIPES["blockwise"])))


@needs_fused
@pytest.mark.parametrize("name", ["blockwise", "current"])
def test_experts_at_once(name: str, record_property: Record) -> None:
    """A grouped product, with a group that has no row."""
    from transformer_engine.pytorch import GroupedLinear, fp8_autocast

    sizes = [128, 0, 256, 16]
    inputs = drawn(sum(sizes), K, seed=0)
    layer = GroupedLinear(len(sizes), K, COLUMNS, bias=False, params_dtype=torch.bfloat16)
    context: AbstractContextManager[None] = fp8_autocast(enabled=True, fp8_recipe=engine_recipe(name))
    with context, torch.no_grad():
        output = layer(inputs, sizes)
    recipe = as_engine_scales(RECIPES[name])
    for index, (rows, found) in enumerate(zip(inputs.split(sizes), output.split(sizes), strict=True)):
        if len(rows):
            weight = getattr(layer, f"weight{index}").detach().double()
            figures = held(found, rows.double() @ weight.t(), product(rows.double(), weight, recipe))
            record_property(f"errors, {name}, {len(rows)} rows", figures)
