"""The corrections of single modules: their targets exist upstream, and the optimizer is AdamW."""

import ast
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.compat import megatron_cpu
from megatron_r1.compat.megatron_fixes import FIXES, ON_GPUS, FusedAdam

PATCHED = {
    "megatron.core.jit": ["disable_jit_fuser"],
    "megatron.core.optimizer": ["Adam", "USING_PYTORCH_OPTIMIZER"],
    "megatron.core.optimizer.distrib_optimizer": ["Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"],
    "megatron.core.tensor_parallel.random": [
        "_get_cuda_rng_state", "_set_cuda_rng_state", "_MODEL_PARALLEL_RNG_TRACKER_NAME", "CudaRNGStatesTracker",
        "CheckpointWithoutOutput",
    ],
    "megatron.core.transformer.multi_latent_attention": ["HAVE_TE", "apply_rotary_pos_emb"],
    "megatron.core.transformer.moe.moe_utils": ["te_general_gemm", "maybe_move_tensor_to_cpu"],
    "megatron.core.transformer.multi_token_prediction": ["roll_tensor", "MTPLossAutoScaler", "MTPLossLoggingHelper"],
}  # fmt: skip
ABSENT_UPSTREAM = {"te_general_gemm"}  # that it is missing there without Transformer Engine is what is corrected


def source(module: str) -> Path:
    """Where a module stands; nothing is imported, so that the hook of other tests is not too late."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec
    assert spec.origin
    stem = Path(spec.origin).parent.joinpath(*module.split(".")[2:])
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def defined(path: Path) -> set[str]:
    """Names that a module's source binds or imports, on any level."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_no_fix_is_left_out() -> None:
    assert PATCHED.keys() == FIXES.keys()
    assert PATCHED.keys() - ON_GPUS.keys() == {"megatron.core.jit"}  # torch.compile is wanted on a GPU


@pytest.mark.parametrize("module", PATCHED)
def test_what_a_fix_replaces_exists_upstream(module: str) -> None:
    path = source(module)
    assert set(PATCHED[module]) - defined(path) <= ABSENT_UPSTREAM
    assert [name for name in ABSENT_UPSTREAM & set(PATCHED[module]) if name not in path.read_text()] == []


def as_on_a_gpu(name: str) -> ModuleType:
    """A module of Megatron's as it is written, beside the one that is rewritten for a CPU; under a name of its own."""
    megatron_cpu.enable()  # for what it imports
    spec = importlib.util.spec_from_file_location(f"{name}_on_a_gpu", source(name))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recomputed(module: ModuleType) -> torch.Tensor:
    """Half of an input's square, whose forward pass goes through Megatron's recomputation without output."""
    own = module.CheckpointWithoutOutput()
    value: torch.Tensor = module.CheckpointWithoutOutputFunction.apply(lambda x: x * x / 2, own, torch.tensor(3.0))
    return value


def test_recomputing_norms_asks_transformer_engine_for_nothing_where_it_is_missing() -> None:
    name = "megatron.core.tensor_parallel.random"
    module = as_on_a_gpu(name)
    if module.HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(NameError, match="FP8GlobalStateManager"):
        recomputed(module)  # upstream; where this passes, the fix can go
    generator = module._get_cuda_rng_state, module._set_cuda_rng_state, module.CudaRNGStatesTracker.fork
    ON_GPUS[name](module)
    assert float(recomputed(module)) == 4.5
    assert generator == (module._get_cuda_rng_state, module._set_cuda_rng_state, module.CudaRNGStatesTracker.fork)


def test_with_transformer_engine_recomputation_is_as_it_was() -> None:
    name = "megatron.core.tensor_parallel.random"
    module = as_on_a_gpu(name)
    module.HAVE_TE = True  # type: ignore[attr-defined]
    ON_GPUS[name](module)
    assert module.CheckpointWithoutOutput().fp8


SETTINGS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (11,), (3, 2, 2))]


def take_step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    """Gradients that depend on the step alone; the second parameter has none at first."""
    torch.manual_seed(100 + number)
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape)
        param.grad = None if index == 1 and number < 2 else gradient
    optimizer.step()


def test_fused_adam_is_adamw() -> None:
    ours, theirs = parameters(), parameters()
    first, second = FusedAdam(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    del ours[1], theirs[1]  # torch counts steps for each parameter, this class for the group: one starting late differs
    for number in range(6):
        take_step(ours, first, number + 2)
        take_step(theirs, second, number + 2)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    assert first.param_groups[0]["step"] == 6


def test_without_decoupling_it_is_adam() -> None:
    ours, theirs = parameters(), parameters()
    first, second = FusedAdam(ours, adam_w_mode=False, **SETTINGS), torch.optim.Adam(theirs, **SETTINGS)
    for number in range(2, 5):
        take_step(ours, first, number)
        take_step(theirs, second, number)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_its_state_goes_on_bit_for_bit() -> None:
    params = parameters()
    optimizer = FusedAdam(params, **SETTINGS)
    for number in range(3):
        take_step(params, optimizer, number)
    state = copy.deepcopy(optimizer.state_dict())
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = FusedAdam(others, lr=1.0)
    resumed.load_state_dict(state)
    for number in range(3, 6):
        take_step(params, optimizer, number)
        take_step(others, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


class Devices(TorchDispatchMode):
    """The devices of all tensors that each of Adam's fused kernels is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[set[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_fused_adam" in str(func):
            self.found.append({tensor.device.type for tensor in tensors(args)})
        return func(*args, **(kwargs or {}))


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """All of nested lists."""
    for part in tree:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from tensors(part)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_that_a_fused_kernel_reads_is_where_its_parameters_are(device: str, decoupled: bool) -> None:
    """CUDA's takes the addresses of the step counts for its own; "meta" stands for a device that is not the CPU."""
    params = [torch.nn.Parameter(param.to(device)) for param in parameters()]
    optimizer = FusedAdam(params, adam_w_mode=decoupled, **SETTINGS)
    for param in params:
        param.grad = torch.ones_like(param)
    with Devices() as devices:
        optimizer.step()
        optimizer.step()
    assert devices.found == [{device}, {device}]
    assert optimizer.param_groups[0]["step"] == 2
