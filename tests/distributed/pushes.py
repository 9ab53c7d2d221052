"""Weights that every rank writes its share of: what each wrote and was sent, and what a push does that fails on one."""

import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_r1.errors import UserError
from megatron_r1.model import collect
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.placement import shares
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.fp8_weights import Fp8Weights
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.transport import as_it_is, preflight, send
from tests.convert.invented import same

SMALL = 10_000
"""Bytes of a file, fewer than a rank's share."""


class Keeping:
    """An engine that keeps what it was given: what is in which file."""

    def __init__(self) -> None:
        self.loaded: dict[int, dict[str, dict[str, torch.Tensor]]] = {}

    def update_weights(self, path: Path, version: int) -> None:
        self.loaded[version] = {file.stem: load_file(file) for file in path.glob("*.safetensors")}


def pushed(model: BuiltModel, part: dict[str, Any], seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A push with what comes before it: each rank's file, what the rank holds, and what it was sent."""
    engine = Keeping()
    sync = DiskSync(engine if dist.get_rank() == 0 else None, Path(part["to"]))
    stored = Fp8Weights(Path(part["fp8"]), Path(part["model"])) if "fp8" in part else as_it_is
    export = model.export(torch.bfloat16)
    plan = preflight(lambda tensors: sync.push(tensors, PREFLIGHT), export, "disk", stored)
    with received() as messages:
        send(lambda tensors: sync.push(stored(tensors), 1), export, "disk")
    seen["agreeing"] = agreeing(model, sync, engine)
    held = {share.name: share.tensor.numel() for share in shares(model.chunks)}
    names = {name: rule.megatron for rule in model.map.rules for name in (*rule.hf, *rule.copies)}
    wholes = {name: math.prod(parts[0].shape) for name, parts in (model.map._senders or {}).items()}
    mine = {"held": held, "messages": messages}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    files = engine.loaded.get(1, {})
    seen |= {
        "ranks": ranks,
        "names": names,
        "wholes": wholes,
        "tried": plan.tried,
        "bytes": plan.bytes,
        "plan": str(plan),
    }
    seen["files"] = {file: list(tensors) for file, tensors in files.items()}
    seen["few"] = sorted(name for tensors in engine.loaded.get(PREFLIGHT, {}).values() for name in tensors)
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def agreeing(model: BuiltModel, sync: DiskSync, engine: Keeping) -> list[bool]:
    """Whether the first rank collects what all have written, by turns: in the model's dtype both give views of it."""
    export, found = model.export(torch.float32), []
    for version in (2, 3):
        send(partial(sync.push, version=version), export, "disk")
        alone = dict(export)
        files = engine.loaded.get(version, {}).values()
        together = {name: one for each in files for name, one in each.items()}
        found.append(same(together, alone) and sum(map(len, files)) == len(alone))
    return found


@contextmanager
def received() -> Iterator[list[tuple[int, int]]]:
    """Sender and bytes of each tensor's part that this rank gets meanwhile."""
    batch, found = collect._batch, list[tuple[int, int]]()

    def noted(operations: list[dist.P2POp]) -> None:
        found.extend((one.peer, one.tensor.nbytes) for one in operations if one.op is dist.irecv)
        batch(operations)

    collect._batch = noted
    try:
        yield found
    finally:
        collect._batch = batch


def broken(model: BuiltModel, part: dict[str, Any], seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A push, one that the last rank cannot write, one of which a rank cannot quantise its share, and a whole one."""
    engine, folder, rank = Keeping(), Path(part["to"]), dist.get_rank()
    sync = DiskSync(engine if rank == 0 else None, folder)
    stored = Fp8Weights(Path(part["fp8"]), Path(part["model"]))

    def push(version: int, convert: Callable[[NamedTensors], NamedTensors] = as_it_is) -> None:
        """All ranks' errors, and what there is afterwards."""
        said: list[Any] = [None] * dist.get_world_size()
        try:
            send(lambda tensors: sync.push(convert(tensors), version), model.export(torch.bfloat16), "disk")
            mine = ""
        except UserError as error:
            mine = f"{type(error).__name__}: {error}"
        dist.all_gather_object(said, mine)
        seen[str(version)] = {"said": said, "left": sorted(path.name for path in folder.iterdir())}
        dist.barrier()

    push(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, limits[1]))
    push(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [share] = [one for one in shares(model.chunks) if one.name == part["nan"]]
    good = share.tensor.clone()
    share.tensor.fill_(math.nan)
    push(3, stored)
    share.tensor.copy_(good)
    push(4, stored)
    return {name: tensor for tensors in engine.loaded.get(4, {}).values() for name, tensor in tensors.items()}
