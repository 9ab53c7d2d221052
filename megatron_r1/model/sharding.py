"""Where each tensor of a model stands in a distributed checkpoint, asked of the GPTModel itself without its weights."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_r1.compat.megatron_specs import name_in_rules
from megatron_r1.errors import DataError
from megatron_r1.model.build import build_skeleton
from megatron_r1.model.family import HFConfig
from megatron_r1.model.parallel import shared_by_processes


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a global tensor of a distributed checkpoint; prepended axes (layer, expert) are included."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of the module stands."""

    shape: tuple[int, ...]
    """Of the module's own tensor: `Rule.join` gives it, `Rule.cut` takes it."""
    dtype: torch.dtype
    """float32 for what is always kept in it (the router's bias), else that of config.json's `torch_dtype`."""
    pieces: tuple[Piece, ...]
    """Consecutive blocks of the module tensor's rows (dimension 0). A gated MLP's first matrix has two, else one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole model's places."""

    places: Mapping[str, Place]
    """By the module's own names, which are those of `Rule.megatron`."""
    objects: tuple[str, ...]
    """Unique keys of the empty `_extra_state` objects, without which Megatron refuses to load a checkpoint."""


def layout(hf: HFConfig, style: Mapping[str, bool] | None = None) -> Layout:
    """The places of the whole model that a `config.json` describes, its MTP layers included.

    Keys and shapes do not depend on how many processes will load it. No weights are made: DeepSeek-V3's 671B take some
    20 seconds and 0.8 GiB.

    Args:
        hf: the model's `config.json`.
        style: switches of Megatron's `sharded_state_dict` (its `metadata`) under which a checkpoint was saved, such as
            `non_homogeneous_layers`; None = its defaults, which are ours.

    Raises:
        DataError: unsupported architecture or value.
    """
    return _layout(json.dumps(hf, sort_keys=True), tuple(sorted(key for key, on in (style or {}).items() if on)))


@lru_cache(maxsize=2)  # a verb asks for that of each of its checkpoints, which are often of one model
def _layout(config: str, switches: tuple[str, ...]) -> Layout:
    hf: HFConfig = json.loads(config)
    stored = _stored_dtype(hf)
    with _one_process():
        model = build_skeleton(hf)
        sharded = model.sharded_state_dict(prefix="", metadata=dict.fromkeys(switches, True))
    places, objects = {}, []
    for name, entry in sharded.items():
        if isinstance(entry, ShardedObject):
            objects.append(entry.unique_key)
        else:
            dtype = torch.float32 if entry.data.dtype == torch.float32 else stored
            places[name_in_rules(name)] = Place(
                tuple(entry.data.shape), dtype, tuple(_piece(part) for part in _parts(entry))
            )
    return Layout(MappingProxyType(places), tuple(objects))


def _stored_dtype(hf: HFConfig) -> torch.dtype:
    name = hf.get("torch_dtype") or hf.get("dtype") or "bfloat16"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"config.json: torch_dtype = {name!r} is no dtype of torch's, such as 'bfloat16'")
    return dtype


def _parts(entry: Any) -> list[ShardedTensor]:
    """A factory stands for several blocks of rows (gate and up of a gated MLP)."""
    if isinstance(entry, ShardedTensorFactory):
        parts: list[ShardedTensor] = entry.build()
        return parts
    return [entry]


def _piece(tensor: ShardedTensor) -> Piece:
    prepended = (1,) * tensor.prepend_axis_num
    return Piece(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), prepended + tensor.local_shape)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Megatron's parallel state of a single process, gone again afterwards unless it was there before."""
    if parallel_state.model_parallel_is_initialized():
        if shared_by_processes():
            raise RuntimeError("a model's layout is that of one process, but here processes share a model")
        yield
        return
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()
