"""What a killed run goes on from: model, optimizer, schedule, reference and loop state, in Megatron's
distributed format (readable under another data-parallel size).

A checkpoint is written aside and renamed, so one that has its final name is whole.
"""

import os
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_r1.compat.checkpoint_pickles import refuse_foreign_pickles
from megatron_r1.compat.megatron_checkpoint import keep_results_in_process
from megatron_r1.config.sections import CheckpointSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.mapping import frozen
from megatron_r1.model.trainable import Trainable

keep_results_in_process()
refuse_foreign_pickles()

_NAME = re.compile(r"step_(\d{8})")
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_SETTINGS = ("max_lr", "min_lr", "betas", "eps")

WeightSets = dict[str, dict[str, torch.Tensor]]
"""Name of a set -> the model's tensors by their own names."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they stand, one folder each.
        section: the run's [checkpoint].
        identity: what must not change while a run goes on, such as its seed.
    """

    def __init__(self, folder: Path, section: CheckpointSection, identity: dict[str, int]) -> None:
        self.folder, self.section, self.identity = folder, section, identity

    def latest(self) -> int | None:
        """Steps done by the newest whole checkpoint, None if there is none."""
        return max((_steps(path) for path in self._whole()), default=None)

    def due(self, done: int, total: int) -> bool:
        """Whether to save after `done` of `total` steps."""
        return done % self.section.every == 0 or done == total

    def save(self, done: int, trainable: Trainable, weights: WeightSets, figures: dict[str, float]) -> None:
        """Write the state after `done` steps, then drop all but the newest `keep`.

        Args:
            done: steps done.
            trainable: the model and its optimizer.
            weights: further sets of the model's weights to keep, by name (the reference policy).
            figures: what the loop wants back.
        """
        final = self.folder / f"step_{done:08d}"
        partial = final.with_name(final.name + ".partial")
        if dist.get_rank() == 0:
            for left in self.folder.glob("*.partial"):  # by a run that was killed
                shutil.rmtree(left)
            if final.exists():  # a critic's, whose policy was not saved with it before the run was killed
                shutil.rmtree(final.rename(partial))
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self._state(trainable, weights, figures), str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            os.replace(partial, final)
            for old in sorted(self._whole(), key=_steps)[: -self.section.keep]:
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
        dist.barrier()

    def load(self, done: int, trainable: Trainable, weights: WeightSets) -> dict[str, float]:
        """Restore the state after `done` steps in place, `weights` too. Returns the figures saved with it.

        Raises:
            DataError: the checkpoint does not fit the model or cannot be read.
            ConfigError: it is of a run with another identity.
        """
        path = self.folder / f"step_{done:08d}"
        try:
            self._check_identity(path, dist_checkpointing.load_common_state_dict(str(path))["identity"])
            state = dist_checkpointing.load(
                self._state(trainable, weights, None), str(path), strict=StrictHandling.RAISE_ALL
            )
        except ConfigError:
            raise
        except (Exception, CheckpointException) as error:  # torch's own is a bare BaseException
            raise DataError(
                f"cannot resume from {path}: it is damaged or of another model ({_reason(error)}); "
                "delete it to go on from the one before, or choose another output folder"
            ) from error
        trainable.module.load_state_dict(state["model"], strict=not frozen(trainable.module))
        _load_optimizer(trainable, state)
        for name, tensors in weights.items():
            for key, tensor in tensors.items():
                tensor.copy_(state[f"weights.{name}"][key])
        torch.set_rng_state(state["rng"])
        figures: dict[str, float] = state["figures"]
        return figures

    def _check_identity(self, path: Path, theirs: dict[str, int]) -> None:
        """Before the load, which writes into the model's own memory."""
        changed = [key for key, value in self.identity.items() if theirs.get(key) != value]
        if changed:
            raise ConfigError(
                f"{path} is of a run with {', '.join(f'{key} = {theirs.get(key)}' for key in changed)}, "
                f"this one has {', '.join(f'{key} = {self.identity[key]}' for key in changed)}: choose another output "
                "folder for a new run, or give it the old value to go on"
            )

    def _whole(self) -> list[Path]:
        return [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]

    def _state(self, trainable: Trainable, weights: WeightSets, figures: dict[str, float] | None) -> dict[str, Any]:
        """What a checkpoint holds; `figures` is None when it is about to be loaded.

        Frozen weights, which the model's folder holds already, are left out.
        """
        fixed = frozen(trainable.module)
        metadata = _METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        model = trainable.module.sharded_state_dict(prefix="model.", metadata=metadata)
        state = {
            "model": _without(fixed, model, "model."),
            "optimizer": trainable.optimizer.sharded_state_dict(model, is_loading=figures is None, metadata=metadata),
            "scheduler": trainable.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "figures": figures,
            "identity": self.identity,
        }
        for name, tensors in weights.items():
            prefix = f"weights.{name}."
            sharded = _without(fixed, trainable.module.sharded_state_dict(prefix=prefix, metadata=metadata), prefix)
            state[f"weights.{name}"] = {key: _with_data(value, tensors.get(key)) for key, value in sharded.items()}
        return state


def _steps(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _reason(error: BaseException) -> str:
    """The kind and the beginning of an error; of torch's collected ones, the first rank's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)


def _load_optimizer(trainable: Trainable, state: dict[str, Any]) -> None:
    """Moments and step counts from the checkpoint; rates and schedule from the run file, which may have changed."""
    optimizer, scheduler = trainable.optimizer, trainable.scheduler
    settings = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    with torch.no_grad():
        optimizer.load_state_dict(state["optimizer"])
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    scheduler.num_steps = 0
    scheduler.step(state["scheduler"]["num_steps"])


def _without(names: set[str], sharded: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A sharded state by the model's own names, but for `names`."""
    named = {key.removeprefix(prefix): value for key, value in sharded.items()}
    return {key: value for key, value in named.items() if key not in names}


def _with_data(entry: Any, tensor: torch.Tensor | None) -> Any:
    """The same place in the checkpoint, holding `tensor` instead of the model's own."""
    if isinstance(entry, ShardedTensor | ShardedBase) and tensor is not None:
        entry.data = tensor
    return entry
