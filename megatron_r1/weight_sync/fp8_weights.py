"""New weights in the numbers of engines that serve DeepSeek's FP8: half the bytes on their way."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_r1.errors import ConfigError
from megatron_r1.model import fp8
from megatron_r1.model.hf_folder import QUANTIZATION, TensorReader, read_config
from megatron_r1.model.parallel import device
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.weight_sync.named_tensors import NamedTensors

_SAID_OTHERWISE = {QUANTIZATION, "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
"""What two `config.json` of one model may say differently."""


class Fp8Weights:
    """Quantises what the folder that engines have started on holds in FP8, in its blocks; the rest is left as it is.

    Args:
        folder: that of the engines (`rollout.fp8_path`).
        trained: that of the learner (`model.path`).

    Raises:
        ConfigError: the folder of the engines is not in FP8, or has another model.
        DataError: it is damaged.
    """

    def __init__(self, folder: Path, trained: Path) -> None:
        theirs, ours = read_config(folder), read_config(trained)
        quantization, reader = theirs.get(QUANTIZATION) or {}, TensorReader(folder)
        self._names = {name for name, entry in reader.stored.items() if entry.dtype is torch.float8_e4m3fn}
        self._block = reader.block
        self._scale_format: fp8.ScaleFormat = "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else "float32"
        if quantization.get("quant_method") != "fp8" or not self._names:
            raise ConfigError(
                f"rollout.fp8_path: {folder} is not in DeepSeek's FP8: `megatron-r1 cast {trained} FOLDER --dtype=fp8` "
                "makes a folder that is"
            )
        differing = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
        if named := [f"{one} = {theirs.get(one)!r}" for one in differing if one not in _SAID_OTHERWISE]:
            raise ConfigError(
                f"rollout.fp8_path: engines would serve another model than {trained}, as config.json of {folder} has "
                f"{', '.join(named)}: `megatron-r1 cast {trained} FOLDER --dtype=fp8` makes a folder that fits"
            )

    def __call__(self, tensors: NamedTensors) -> NamedTensors:
        """What engines are sent; each weight is quantised when it is its turn, where it is."""
        specs: dict[str, Spec] = {}
        for name, spec in tensors.specs.items():
            specs |= fp8.stored(name, spec.shape, self._block) if name in self._names else {name: spec}
        return tensors.turned_into(self._quantized(tensors), specs)

    def _quantized(self, tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if name not in self._names:
                yield name, tensor
                continue
            weight, scale = fp8.quantize(tensor.detach().to(device()), self._block, self._scale_format, name)
            yield name, weight
            yield name + fp8.SCALE_SUFFIX, scale
