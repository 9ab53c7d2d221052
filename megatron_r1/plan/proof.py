"""The plan's bytes against those of the real modules: each rank's GPTModel, data-parallel wrapper and optimizer.

They are built as a run builds them, but on torch's meta device, which keeps shapes and no memory, and under torch's
fake process group of the true size, in which the other ranks do nothing.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.kernels import KernelsSection
from megatron_r1.config.schedule import largest
from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection
from megatron_r1.model.build import build_model
from megatron_r1.model.hf_folder import read_config
from megatron_r1.model.parallel import initialize
from megatron_r1.model.trainable import Trainable
from megatron_r1.optim.optimizer import make_trainable


def real_state(
    section: ModelSection, parallel: ParallelSection, gpus: int, rank: int, scalar: bool = False
) -> dict[str, int]:
    """`parameters` and bytes of `weights`, `gradients` and `optimizer` of a rank's real modules.

    Args:
        section: the run's [model]; its weights are not read.
        parallel: the run's [parallel].
        gpus: size of the process group.
        rank: which to be.
        scalar: with a scalar head.
    """
    with _without_weights(section) as unread, _rank(parallel, gpus, rank), _OnMeta(), torch.device("meta"):
        model = build_model(unread, 1, "scalar" if scalar else None)
        trainable = make_trainable(model, OptimSection(lr=1.0), updates=1)
        for adam in trainable.optimizer.chained_optimizers:
            adam.init_state_fn(adam.optimizer, adam.config)
        params = [param for chunk in model.chunks for param in chunk.parameters()]
        return {
            "parameters": sum(param.numel() for param in params),
            "weights": sum(param.nbytes for param in params),
            "gradients": sum(
                buffer.grad_data.nbytes
                for ddp in trainable.ddp
                for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]
            ),
            "optimizer": _optimizer_bytes(trainable, copies=model.config.bf16),
        }


def _optimizer_bytes(trainable: Trainable, copies: bool) -> int:
    """Moments, and in bfloat16 the copies of the weights in float32."""
    total = 0
    for adam in trainable.optimizer.chained_optimizers:
        for param, moments in adam.optimizer.state.items():
            total += sum(moment.nbytes for moment in moments.values()) + (param.nbytes if copies else 0)
    return total


@contextlib.contextmanager
def _without_weights(section: ModelSection) -> Iterator[ModelSection]:
    """The same model in plain torch's modules, with nothing to read.

    Nor with an MTP layer that is not trained, which is never built.
    """
    hf = read_config(section.path)
    if "num_nextn_predict_layers" in hf and not largest(section.mtp_loss_coef):
        hf["num_nextn_predict_layers"] = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf))
        plain = {"kernels": KernelsSection(layers="local"), "fp8": None}
        yield section.model_copy(update={"load_weights": False, "path": Path(folder), **plain})


@contextlib.contextmanager
def _rank(parallel: ParallelSection, gpus: int, rank: int) -> Iterator[None]:
    """Megatron's parallel state as that rank has it. No process group may be there before."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=gpus)
    try:
        initialize(parallel, seed=0)
        with patch.object(dist, "all_gather_object", _alone):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _alone(objects: list[Any], own: Any, group: Any = None) -> None:
    """The fake group fills nothing in; the others have what this rank has."""
    objects[:] = [own] * len(objects)


class _OnMeta(TorchFunctionMode):
    """Every tensor on the meta device, whatever device is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if named.get("device") is not None:
            named["device"] = "meta"
        if func is torch.Tensor.to:
            args = tuple(torch.device("meta") if isinstance(value, torch.device) else value for value in args)
        result = func(*args, **named)
        # Megatron's optimizer knows types of tensors by their names.
        return result.replace("torch.meta.", "torch.") if func is torch.Tensor.type and len(args) == 1 else result
