"""What the device does at most: matrix products and copies, each the median of several runs on random numbers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

RUNS = 10
SIZE, TINY_SIZE = 8192, 256
COPIED, TINY_COPIED = 2**31, 2**24
"""Bytes; a gigabyte and more, so that caches hold none of it."""


@dataclass(frozen=True)
class Peaks:
    """TFLOP/s of matrix products, GB/s of copies; None where the device cannot."""

    bf16: float
    fp8: float | None
    copy: float
    """Within the device, bytes read plus bytes written."""
    to_host: float
    """Into pinned memory."""
    to_device: float
    """From pinned memory."""


def measure(tiny: bool) -> Peaks:
    """All of them; on a machine without a GPU those of its processor. Leaves no memory behind."""
    peaks = _measured(tiny)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the model's size is chosen by what is free
    return peaks


def _measured(tiny: bool) -> Peaks:
    size, nbytes = (TINY_SIZE, TINY_COPIED) if tiny else (SIZE, COPIED)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    work = 2 * size**3 / 1e12
    source = torch.randint(100, (nbytes,), dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
    return Peaks(
        bf16=work / seconds(lambda: left @ right),
        fp8=work / seconds(_fp8(left, right)) if cuda else None,
        copy=2 * nbytes / 1e9 / seconds(lambda: target.copy_(source)),
        to_host=nbytes / 1e9 / seconds(lambda: host.copy_(source)),
        to_device=nbytes / 1e9 / seconds(lambda: target.copy_(host)),
    )


def _fp8(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A product with one scale for each factor: the fastest that FP8 has."""
    rows, columns = left.to(torch.float8_e4m3fn), right.t().contiguous().to(torch.float8_e4m3fn).t()
    one, whole = torch.ones((), device=left.device), F.ScalingType.TensorWise
    return lambda: F.scaled_mm(rows, columns, one, whole, one, whole, output_dtype=torch.bfloat16, use_fast_accum=True)


def seconds(work: Callable[[], object]) -> float:
    """Of one call, after two that do not count."""
    found = []
    for _ in range(2 + RUNS):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
