"""How fast a model is trained: tokens, operations, and the share of what the device could do."""

from collections.abc import Sequence

import torch

from megatron_r1.model.build import BuiltModel
from megatron_r1.model.flops import forward_flops, output_rows, training_flops

PEAKS: dict[str, dict[torch.dtype, float]] = {
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float32: 51e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H800": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "B200": {torch.bfloat16: 2250e12, torch.float32: 75e12},
}
"""Part of a device's name -> operations a second of dense matrix products, from NVIDIA's data sheets; float32 without
TF32, as torch multiplies by default. The first name that fits counts."""


class Throughput:
    """Figures of passes over known sequences.

    Args:
        model: what is trained. Where some of its weights are not (LoRA), no operations are counted for gradients of
            weights: an adapter's are few.
        processes: devices that share the work.
    """

    def __init__(self, model: BuiltModel, processes: int) -> None:
        self._config, self._outputs, self._processes = model.config, output_rows(model.hf), processes
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self._peak = peak(name, model.config.params_dtype)
        self._adapters = any(not weight.requires_grad for chunk in model.chunks for weight in chunk.parameters())

    def figures(self, lengths: Sequence[int], seconds: float, forward_passes: int = 0) -> dict[str, float]:
        """Of one pass forward and backward over sequences.

        `tokens_per_second` of all devices, `tflops` (10^12 operations a second) of each, and, where the device's peak
        is known, `mfu`: operations a second over that peak (arXiv 2204.02311, appendix B). What they count is said in
        `model/flops.py`.

        Args:
            lengths: tokens of each sequence, of all ranks.
            seconds: that it took.
            forward_passes: more passes over the same in this time, without a backward pass.
        """
        work = training_flops(self._config, self._outputs, lengths).total
        forward_passes -= self._adapters  # gradients of weights take as many operations as a forward pass
        work += forward_passes * forward_flops(self._config, self._outputs, lengths).total
        rate = work / seconds / self._processes
        figures = {"tokens_per_second": sum(lengths) / seconds, "tflops": rate / 1e12}
        return figures | ({"mfu": rate / self._peak} if self._peak else {})


def peak(device: str, dtype: torch.dtype) -> float | None:
    """Operations a second that a device can do at most; None where it is not known, as of CPUs."""
    known = (peaks for name, peaks in PEAKS.items() if name in device)
    return next(known, {}).get(dtype)
