"""Tensors as engines store them in FP8 blocks, from those that the learner has."""

import pytest
import torch

from megatron_r1.errors import DataError
from megatron_r1.model import fp8
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.weight_sync.block_fp8 import BlockFp8
from megatron_r1.weight_sync.named_tensors import NamedTensors

NAMES = {
    "model.layers.0.mlp.down_proj.weight": (200, 300),
    "model.layers.0.mlp.gate.weight": (8, 300),
    "n.weight": (5,),
}


def tensors() -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=drawn).bfloat16() for name, shape in NAMES.items()}


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_linear_layers_are_quantised_and_told_ahead(scale_format: fp8.ScaleFormat) -> None:
    sent = tensors()
    served = BlockFp8({"quantization_config": fp8.quantization_config(scale_format)}).of(NamedTensors.of(sent))
    found = dict(served)
    assert {name: Spec(one.dtype, tuple(one.shape)) for name, one in found.items()} == served.specs
    assert list(found) == list(served.specs)
    linear, gate, norm = NAMES
    assert torch.equal(found[gate], sent[gate])
    assert torch.equal(found[norm], sent[norm])
    scale = found[linear + "_scale_inv"]
    assert scale.shape == (2, 3)
    if scale_format == "ue8m0":
        assert torch.equal(scale.log2(), scale.log2().round())
    # by hand: the second block of rows and the third of columns
    corner = found[linear][128:, 256:].float() * scale[1, 2]
    exact = sent[linear][128:, 256:].float()
    assert (corner - exact).abs().max() <= exact.abs().max() * (1 if scale_format == "float32" else 2) / 28
    assert float(found[linear][128:, 256:].float().abs().max()) >= (448 if scale_format == "float32" else 224)


def test_layers_that_the_checkpoint_keeps_are_sent_as_they_are() -> None:
    config = fp8.quantization_config(kept=["model.layers.0.mlp.down_proj"])
    served = BlockFp8({"quantization_config": config}).of(NamedTensors.of(tensors()))
    assert list(served.specs) == list(NAMES)
    assert all(torch.equal(one, tensors()[name]) for name, one in served)


def test_other_checkpoints() -> None:
    sent = NamedTensors.of(tensors())
    assert BlockFp8({"model_type": "llama"}).of(sent) is sent
    with pytest.raises(DataError, match=r"'fp8', weight_block_size \[64, 64\].*blocks of \[128, 128\]"):
        BlockFp8({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}})
    with pytest.raises(DataError, match="quant_method 'awq'"):
        BlockFp8({"quantization_config": {"quant_method": "awq"}})
