"""Imported by a vLLM worker of the tests: FP8 in blocks on any processor, `on_cpu.py`'s stand-ins, and our receiver.

vLLM's own kernels for a CPU need AMX. The one here multiplies by the numbers that the blocks stand for; all else is
vLLM's: configuration, layers, loading, reloading.
"""

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.platforms import PlatformEnum

from tests.rollout import on_cpu_worker


class Plain(Fp8BlockScaledMMLinearKernel):
    """Activations stay in bfloat16, as with AMX."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def apply_block_scaled_mm(self, **of: torch.Tensor) -> torch.Tensor:
        """x "A" and the weight "B" with its scales "Bs"; "As" would be those of x."""
        (rows, columns), weight = self.weight_group_shape, of["B"]
        scale = of["Bs"].repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
        return of["A"].float() @ (weight.float() * scale).T


linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].insert(0, Plain)


class Receiver(on_cpu_worker.Receiver):
    """What the worker is told to mix in."""
