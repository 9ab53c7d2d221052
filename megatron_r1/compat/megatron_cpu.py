"""Lets megatron-core 0.16.1 train on CPU with gloo, as it does on GPUs with NCCL.

Megatron-core names CUDA directly in some fifty places of its training path (`torch.cuda.current_device()`,
`device="cuda"`, `.cuda()`, `pin_memory=True` ...). `enable()` installs an import hook that rewrites those
names, and only in `megatron.core`'s own modules, as they are loaded: line numbers stay, torch itself is not
touched, nothing on disk changes. Where CUDA is present nothing is rewritten, and of `megatron_fixes` only what plain
torch's layers need is applied.

Can go when megatron-core asks `torch.accelerator` (or its platform layer) for the device.
`tests/compat/test_megatron_cpu.py` fails when a rule no longer matches anything.
"""

import contextlib
import importlib.abc
import importlib.machinery
import logging
import re
import sys
import time
import types
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_r1.compat.megatron_fixes import FIXES, ON_GPUS

NAMESPACE = "_megatron_r1_cuda"
"""What rewritten modules see instead of `torch.cuda`."""

RULES: list[tuple[str, re.Pattern[str], str]] = [
    ("tensor type names", re.compile(r"""(['"])torch\.cuda\.(\w*Tensor)"""), r"\1torch.\2"),
    ("torch.cuda.*", re.compile(r"(?<!from )(?<!import )\btorch\.cuda\."), f"{NAMESPACE}."),
    ("device='cuda'", re.compile(r"""device=(['"])cuda\1"""), "device='cpu'"),
    ("torch.device('cuda')", re.compile(r"""torch\.device\((['"])cuda\1\)"""), "torch.device('cpu')"),
    (".cuda()", re.compile(rf"\.cuda\((non_blocking=True|{NAMESPACE}\.current_device\(\))?\)"), ""),
    (
        "uneven all_gather",
        re.compile(r"torch\.distributed\.all_gather\(output_tensor_list"),
        f"{NAMESPACE}.all_gather(output_tensor_list",
    ),
    ("pinned memory", re.compile(r"pin_memory=True"), "pin_memory=False"),
    (
        "triton of paged stash",  # 0.19.2 always imports these kernels, and triton without asking whether it is there
        re.compile(r'(?<=paged stash\."""\n\n)import triton\nimport triton\.language as tl\n'),
        f"triton = {NAMESPACE}.Triton\ntl = triton\n",
    ),
]


SILENCED = [
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.* is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "MimoModelConfig is experimental",
]
"""Upstream warnings that the user of a CPU run can do nothing about."""

UNSAID = {
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}
"""Logger -> first words of what 0.19 logs each time where it is used as 0.16 has to be."""


class _Idle:
    """A CUDA stream on a device that has none: every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


class _Event(_Idle):
    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return 1e3 * (other.time - self.time)


class _Triton:
    """`triton` and `triton.language`, as far as kernels are defined with them: nothing launches one."""

    constexpr = Any

    @staticmethod
    def jit(kernel: Any) -> Any:
        return kernel


class _CpuNamespace(types.ModuleType):
    """`torch.cuda` as seen by rewritten modules; what is not here falls through to torch."""

    Stream, Event, Triton = _Idle, _Event, _Triton

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_stream(self, *args: Any, **kwargs: Any) -> _Idle:
        return _Idle()

    default_stream = current_stream

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, *args: Any, **kwargs: Any) -> None:
        return None

    empty_cache = set_device = synchronize

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def all_gather(self, outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any) -> None:
        """Gloo's all_gather refuses unequal sizes: pad to the largest, then cut."""
        longest = max(output.size(0) for output in outputs)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: tensor.size(0)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        torch.distributed.all_gather(gathered, padded, group=group)
        for output, full in zip(outputs, gathered, strict=True):
            output.copy_(full[: output.size(0)])


def rewrite(source: str) -> str:
    """A megatron-core module's source with every rule applied."""
    for _, pattern, replacement in RULES:
        source = pattern.sub(replacement, source)
    return source


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType | None:
        if torch.cuda.is_available():
            return super().get_code(fullname)
        # Not through the .pyc cache: what runs is not what is on disk.
        path = self.get_filename(fullname)
        return self.source_to_code(rewrite(self.get_data(path).decode()).encode(), path)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)[NAMESPACE] = _CpuNamespace("torch.cuda")
        super().exec_module(module)
        fixes = ON_GPUS if torch.cuda.is_available() else FIXES
        if module.__name__ in fixes:
            fixes[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _is_other(words: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(words)


def enable() -> None:
    """Install the hook. Call it before anything imports megatron.core; a second call does nothing.

    Raises:
        RuntimeError: megatron.core is already imported, so it could not be rewritten.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_r1.compat.megatron_cpu.enable()")
    for message in SILENCED:
        warnings.filterwarnings("ignore", message=message)
    for name, words in UNSAID.items():
        logging.getLogger(name).addFilter(partial(_is_other, words))
    sys.meta_path.insert(0, _Finder())
