"""Tensors in the 8 bits that engines store: for engines that have loaded a checkpoint of DeepSeek's FP8 blocks.

Such an engine takes weights as its checkpoint has them, so the learner quantises before it sends: half the bytes. One
that was started with `--quantization=fp8` takes bfloat16 and quantises by itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megatron_r1.errors import DataError
from megatron_r1.model import fp8
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.weight_sync.named_tensors import NamedTensors


class BlockFp8:
    """What an engine's `config.json` says about 8 bits.

    Args:
        config: the file's content.

    Raises:
        DataError: quantised in another way than in DeepSeek's blocks.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        found = config.get("quantization_config") or {}
        self.on = bool(found)
        blocks = (found.get("quant_method"), tuple(found.get("weight_block_size") or ()))
        if found and blocks != ("fp8", fp8.BLOCK):
            raise DataError(
                f"the engines' config.json has quant_method {blocks[0]!r}, weight_block_size {list(blocks[1])}: new "
                f"weights can be sent to FP8 in blocks of {list(fp8.BLOCK)}, or to bfloat16 (megatron-r1 cast)"
            )
        self._scale_format: fp8.ScaleFormat = "ue8m0" if found.get("scale_fmt") == "ue8m0" else "float32"
        self._kept = tuple(f"{module}.weight" for module in found.get("modules_to_not_convert") or ())

    def of(self, sent: NamedTensors) -> NamedTensors:
        """The same tensors as the engine stores them."""
        return NamedTensors(self._tensors(sent), dict(self._specs(sent.specs))) if self.on else sent

    def _stored(self, name: str) -> bool:
        return fp8.is_quantized(name) and name not in self._kept

    def _specs(self, specs: Mapping[str, Spec]) -> Iterator[tuple[str, Spec]]:
        for name, spec in specs.items():
            if self._stored(name):
                yield name, Spec(torch.float8_e4m3fn, spec.shape)
                yield name + fp8.SCALE_SUFFIX, Spec(torch.float32, fp8.scale_shape(spec.shape))
            else:
                yield name, spec

    def _tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if self._stored(name):
                weight, scale = fp8.quantize(tensor.detach(), scale_format=self._scale_format, name=name)
                yield name, weight
                yield name + fp8.SCALE_SUFFIX, scale
            else:
                yield name, tensor
