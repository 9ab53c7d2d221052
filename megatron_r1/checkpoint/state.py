"""What a checkpoint holds: model, optimizer, schedule, random state, further weights and figures.

Tensors are stored under their names and places in the whole model, so that another layout of processes finds its parts;
see megatron-core's `dist_checkpointing`. Whatever depends on the layout besides is either the same on all ranks, or
stored rank by rank and used by the same layout alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_r1.errors import DataError
from megatron_r1.model.mapping import frozen
from megatron_r1.model.trainable import Trainable

WeightSets = dict[str, list[dict[str, torch.Tensor]]]
"""Name of a set -> for each chunk of the model, its tensors by their own names."""

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_RANDOM = "rng"
_ATTENTION_STATE = "core_attention._extra_state"
"""Of Transformer Engine's attention, empty; older checkpoints and other versions of Megatron have none."""


def layout() -> dict[str, int]:
    """How this run's model is cut; the random state of a rank has a meaning in the same layout only."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "processes": dist.get_world_size(),
    }


def snapshot(trainable: Trainable, weights: WeightSets) -> dict[str, Any]:
    """All that a run needs to go on, as Megatron's sharded state dict."""
    steps = [group.get("step", 0) for group in trainable.optimizer.param_groups]
    return _sharded(trainable, weights, loading=False) | {
        "scheduler": trainable.scheduler.state_dict(),
        "optimizer_steps": max(steps, default=0),
        "layout": layout(),
        _RANDOM: _random_shard(_random_state()),
    }


def restore(path: str, trainable: Trainable, weights: WeightSets, same_layout: bool) -> dict[str, Any]:
    """Read a checkpoint into the model, its optimizer and `weights`, in place; returns all that it holds.

    Args:
        path: its folder.
        trainable: of the run that goes on.
        weights: sets to fill.
        same_layout: whether it was written in this layout, so that its random state can be used.

    Raises:
        DataError: it holds other tensors than this model has.
    """
    wanted = _sharded(trainable, weights, loading=True)
    if same_layout:
        wanted[_RANDOM] = _random_shard(None)
    state, missing, unexpected = dist_checkpointing.load(wanted, path, strict=StrictHandling.RETURN_ALL)
    found = (missing - {_RANDOM}) | unexpected
    different = {key for key in found if _ATTENTION_STATE not in key}
    if different:
        raise DataError(f"{len(different)} tensors are only in one of model and checkpoint, such as {min(different)}")
    for number, chunk in enumerate(trainable.chunks):
        chunk.load_state_dict(state["model"][number], strict=not frozen(chunk))
    _load_optimizer(trainable, state)
    for name, sets in weights.items():
        for number, tensors in enumerate(sets):
            for key, tensor in tensors.items():
                tensor.copy_(state[f"weights.{name}"][number][key])
    if same_layout:
        _set_random_state(state[_RANDOM])
    return dict(state)


def _sharded(trainable: Trainable, weights: WeightSets, loading: bool) -> dict[str, Any]:
    """What is stored by its place in the whole model. Frozen weights, which its folder holds already, are left out."""
    metadata = _SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def model(prefix: str) -> dict[int, dict[str, Any]]:
        return {
            number: _without(frozen(chunk), chunk.sharded_state_dict(prefix=prefix, metadata=metadata), prefix)
            for number, chunk in enumerate(trainable.chunks)
        }

    state: dict[str, Any] = {"model": model("model.")}
    # Without what Megatron stores of an optimizer besides: it is the first rank's, and others may have more parameter
    # groups, or one more optimizer, because only they hold experts.
    state["optimizer"] = {
        number: {"param_state": one.sharded_state_dict(state["model"], loading, metadata=metadata)["param_state"]}
        for number, one in _optimizers(trainable)
    }
    for name, sets in weights.items():
        state[f"weights.{name}"] = {
            number: {key: _with_data(value, sets[number].get(key)) for key, value in sharded.items()}
            for number, sharded in model(f"weights.{name}.").items()
        }
    return state


def _optimizers(trainable: Trainable) -> Iterable[tuple[int, MegatronOptimizer]]:
    """Those of this rank's dense and expert parameters, if it has any that are trained."""
    chained = enumerate(trainable.optimizer.chained_optimizers)
    return ((number, one) for number, one in chained if not one.is_stub_optimizer)


def _load_optimizer(trainable: Trainable, state: dict[str, Any]) -> None:
    """Moments and step counts from the checkpoint; rates and schedule from the run file, which may have changed."""
    for number, one in _optimizers(trainable):
        own = one.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = state["optimizer_steps"]
        kind = _SHARDING["distrib_optim_sharding_type"]
        with torch.no_grad():
            one.load_state_dict({**own, **state["optimizer"][number], "param_state_sharding_type": kind})
    trainable.scheduler.num_steps = 0
    trainable.scheduler.step(state["scheduler"]["num_steps"])


def _random_shard(state: dict[str, Any] | None) -> ShardedObject:
    """The place of this rank's random state among all ranks'."""
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject(_RANDOM, state, sizes, place)


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _without(names: set[str], sharded: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A sharded state by the model's own names, but for `names`."""
    named = {key.removeprefix(prefix): value for key, value in sharded.items()}
    return {key: value for key, value in named.items() if key not in names}


def _with_data(entry: Any, tensor: torch.Tensor | None) -> Any:
    """The same place in the checkpoint, holding `tensor` instead of the model's own."""
    if isinstance(entry, ShardedTensor | ShardedBase) and tensor is not None:
        entry.data = tensor
    return entry
