"""What each FP8 recipe makes of a matrix product, in float64: only what the recipe itself rounds is rounded here.

Kernels on a GPU are held against this (tests/gpu), and this against the definitions (`test_fp8_recipes.py`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WHOLE = (0, 0)
"""A block that is the whole tensor."""
Block = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Which numbers share a scale. Blocks are rows x columns of a matrix; a product sums over its columns."""

    inputs: Block
    """Of activations and of gradients."""
    weights: Block
    gradients: torch.dtype = E4M3
    """What gradients are rounded to; activations and weights always to e4m3."""
    powers: bool = False
    """Scales are powers of two, rounded up."""


RECIPES = {
    "blockwise": Recipe((1, 128), (128, 128)),
    "current": Recipe(WHOLE, WHOLE, E5M2),
    "delayed": Recipe(WHOLE, WHOLE, E5M2),
    "mxfp8": Recipe((1, 32), (1, 32), powers=True),
}
"""By the names of [model.fp8]: DeepSeek-V3 (arXiv 2412.19437) 3.3.2; one scale a tensor, from itself or from earlier
ones (arXiv 2209.05433); OCP Microscaling 1.0."""


def rounded(
    tensor: torch.Tensor, block: Block, form: torch.dtype = E4M3, powers: bool = False, largest: float | None = None
) -> torch.Tensor:
    """The values that are left, float64.

    Args:
        tensor: [rows, columns]
        block: rows and columns that share a scale.
        form: e4m3 or e5m2.
        powers: whether scales are powers of two.
        largest: the number that the scale is made for, instead of the block's own; what exceeds it saturates.
    """
    blocks, shape = _blocks(tensor.double(), block), tensor.shape
    limit = torch.finfo(form).max
    amax = (
        blocks.abs().amax(dim=(1, 3), keepdim=True) if largest is None else torch.full((1, 1, 1, 1), largest).double()
    )
    scale = (amax / limit).float().double().to(tensor.device)
    if powers:
        scale = torch.exp2(scale.log2().ceil())
    scale = torch.where(amax.to(tensor.device) > 0, scale, 1.0)
    # By way of float32, as the kernels do it: torch has no conversion of its own from float64.
    numbers = (blocks / scale).clamp(-limit, limit).float().to(form).double()
    return (numbers * scale).flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def product(inputs: torch.Tensor, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """inputs weight^T of rounded numbers, float64. `[rows, k]`, `[columns, k]` -> `[rows, columns]`"""
    left = rounded(inputs, recipe.inputs, powers=recipe.powers)
    return left @ rounded(weight, recipe.weights, powers=recipe.powers).t()


def input_gradient(gradient: torch.Tensor, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """gradient weight. `[rows, columns]`, `[columns, k]` -> `[rows, k]`"""
    left = rounded(gradient, recipe.inputs, recipe.gradients, recipe.powers)
    return left @ rounded(weight.t(), recipe.weights, powers=recipe.powers).t()


def weight_gradient(gradient: torch.Tensor, inputs: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """gradient^T inputs; both are rounded in blocks along the rows, which this product sums over.

    `[rows, columns]`, `[rows, k]` -> `[columns, k]`
    """
    left = rounded(gradient.t(), recipe.inputs, recipe.gradients, recipe.powers)
    return left @ rounded(inputs.t(), recipe.inputs, powers=recipe.powers).t()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||"""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _blocks(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """`[rows, columns]` -> `[row of blocks, rows of a block, column of blocks, columns of a block]`, zeros behind."""
    height, width = block if block != WHOLE else tensor.shape
    padded = F.pad(tensor, (0, -tensor.size(1) % width, 0, -tensor.size(0) % height))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
