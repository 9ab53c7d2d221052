"""The checkpoints of a run: what a killed run goes on from, in Megatron's distributed format.

One is written aside, gets checksums of all its files, and is renamed: what has its final name is whole, unless it was
damaged later, which `latest` notices. ::

    with report, checkpoints.running(report.message):
        for step in range(start, steps):
            ...
            if checkpoints.due(step + 1, steps):
                checkpoints.save(step + 1, trainable, {}, {})
"""

import os
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_r1.checkpoint import manifest, state
from megatron_r1.checkpoint.signals import Requests, Stopped
from megatron_r1.checkpoint.state import WeightSets
from megatron_r1.checkpoint.writer import Describe, Write
from megatron_r1.compat.checkpoint_pickles import refuse_foreign_pickles
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.data.files import sync
from megatron_r1.errors import ConfigError, DataError, NumericsError
from megatron_r1.model.parallel import device, from_first_rank
from megatron_r1.model.trainable import Trainable

refuse_foreign_pickles()

_NAME = re.compile(r"step_(\d{8,})")


class Checkpoints:
    """The checkpoints of one run. All ranks call each method together.

    Args:
        folder: where they stand, one folder each.
        section: the run's [checkpoint].
        identity: what must not change while a run goes on, such as its seed.
        describe: writes into the folder of each what model it is of, with its tokenizer; None = they do not say.
    """

    def __init__(
        self, folder: Path, section: CheckpointSection, identity: dict[str, int], describe: Describe | None = None
    ) -> None:
        self.folder, self.section, self.identity, self._describe = folder, section, identity, describe
        self.warnings: list[str] = []
        """What the user has to know of what `latest` and `load` found; `running` says it."""
        self._requests = Requests(section.grace_seconds)
        self._ending = False
        self._write: tuple[int, Write] | None = None
        self._saved = time.monotonic()

    @contextmanager
    def running(self, say: Callable[[str], None]) -> Iterator[None]:
        """The part of a run that saves: signals are noted, warnings said, and what is being written is finished."""
        for warning in self.warnings:
            say(f"warning: {warning}")
        try:
            with self._requests.heard():
                yield
        except NumericsError:  # all ranks refuse the same update, so all can finish what they have saved before it
            self.finish()
            raise
        self.finish()

    def latest(self, *others: "Checkpoints") -> int | None:
        """Steps done by the newest whole checkpoint, None if there is none.

        Damaged ones are left where they are, and named in `warnings`.

        Args:
            others: of further models of the run; what they have of the same step must be whole, too.

        Raises:
            DataError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for done in reversed(self.kept()):
            found = [text for store in (self, *others) if (text := store.damage(done))]
            if not found:
                if damaged:
                    self.warnings.append(f"going on from step {done}: {'; '.join(damaged)}")
                return done
            damaged += found
        if damaged:
            raise DataError(
                f"no checkpoint is whole, so nothing can be resumed: {'; '.join(damaged)}. Restore the files, or "
                "delete the folders to begin anew"
            )
        return None

    def kept(self) -> list[int]:
        """Steps done by the checkpoints that stand, ascending."""
        self.finish()
        return from_first_rank(lambda: sorted(self._done()))

    def damage(self, done: int) -> str:
        """What is wrong with the checkpoint after `done` steps, in words; empty = it is whole. Reads all of it."""
        path = self._path(done)
        found = manifest.problems(path)
        return f"{path} is damaged ({manifest.in_words(found)})" if found else ""

    def forget_after(self, done: int) -> None:
        """Drop what is newer than the checkpoint after `done` steps: the run goes another way from there."""
        later = [step for step in self.kept() if step > done]
        from_first_rank(lambda: self._drop(*later))

    def due(self, done: int, total: int) -> bool:
        """Whether to save after `done` of `total` steps: by schedule, by the clock, or because a signal has asked."""
        minutes = self.section.every_minutes
        late = minutes is not None and dist.get_rank() == 0 and time.monotonic() - self._saved >= 60 * minutes
        writing = self._write is not None and self._write[1].running
        flags = torch.tensor([self._requests.asked, late, writing], dtype=torch.int32, device=device())
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        asked, late, writing = map(bool, flags.tolist())
        if not writing:
            self.finish()
        if asked:
            self._requests.reached()
            self._ending = done < total
        return asked or late or done % self.section.every == 0 or done == total

    def save(self, done: int, trainable: Trainable, weights: WeightSets, figures: dict[str, float]) -> None:
        """Write the state after `done` steps, then drop those that the section does not keep.

        Args:
            done: steps done.
            trainable: the model and its optimizer.
            weights: further sets of the model's weights to keep, by name (the reference policy).
            figures: what the loop wants back.

        Raises:
            OSError: the disk is full; the checkpoints before it are untouched.
            DataError: it cannot be written to.
            Stopped: a signal has asked the run to end; all is saved.
        """
        self.finish()
        from_first_rank(lambda: self._clear(done))
        content = state.snapshot(trainable, weights) | {"figures": figures, "identity": self.identity}
        self._write = done, Write(self._partial(done), content, self.section.asynchronous, self._describe)
        self._saved = time.monotonic()
        if self._ending or not self.section.asynchronous:
            self.finish()
        if self._ending:
            raise Stopped

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            OSError, DataError: as `save`.
        """
        if self._write:
            (done, write), self._write = self._write, None
            write.finish()
            from_first_rank(lambda: self._keep(done))

    def load(self, done: int, trainable: Trainable, weights: WeightSets) -> dict[str, float]:
        """Restore the state after `done` steps in place, `weights` too. Returns the figures saved with it.

        Raises:
            DataError: the checkpoint does not fit the model or cannot be read.
            ConfigError: it is of a run with another identity.
        """
        path = self._path(done)
        try:
            stored = dist_checkpointing.load_common_state_dict(str(path))
            self._check_identity(path, stored["identity"])  # before the load, which writes into the model's own memory
            same = stored["layout"] == state.layout()
            content = state.restore(str(path), trainable, weights, same)
        except ConfigError:
            raise
        except (Exception, CheckpointException) as error:  # torch's own is a bare BaseException
            raise DataError(
                f"cannot resume from {path}: it is damaged or of another model ({_reason(error)}); "
                "delete it to go on from the one before, or choose another output folder"
            ) from error
        if not same:
            changed = ", ".join(
                f"{name} {old}" for name, old in stored["layout"].items() if old != state.layout()[name]
            )
            self.warnings.append(
                f"{path.name} was written by another layout ({changed}): the generators of random numbers start anew, "
                "so what is dropped out differs from a run without a break"
            )
        figures: dict[str, float] = content["figures"]
        return figures

    def _check_identity(self, path: Path, theirs: dict[str, int]) -> None:
        changed = [key for key, value in self.identity.items() if theirs.get(key) != value]
        if changed:
            raise ConfigError(
                f"{path} is of a run with {', '.join(f'{key} = {theirs.get(key)}' for key in changed)}, "
                f"this one has {', '.join(f'{key} = {self.identity[key]}' for key in changed)}: choose another output "
                "folder for a new run, or give it the old value to go on"
            )

    def _path(self, done: int) -> Path:
        return self.folder / f"step_{done:08d}"

    def _partial(self, done: int) -> Path:
        return self._path(done).with_suffix(".partial")

    def _done(self) -> list[int]:
        """Steps done by the checkpoints that have their final name."""
        return [int(match[1]) for path in self.folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]

    def _clear(self, done: int) -> None:
        """Remove what a killed run left, and an earlier checkpoint of the same step.

        There is one of a critic's whose policy was not saved with it, and a damaged one that was passed over.
        """
        for left in self.folder.glob("*.partial"):
            shutil.rmtree(left)
        if self._path(done).exists():
            self._drop(done)

    def _keep(self, done: int) -> None:
        """Give a checkpoint its final name; drop older ones, and those of a future that the run has gone back from."""
        os.replace(self._partial(done), self._path(done))
        sync(self.folder)
        past = sorted(step for step in self._done() if step <= done)
        always = self.section.keep_every
        kept = {step for step in past if always and step % always == 0} | set(past[-self.section.keep :])
        self._drop(*set(self._done()) - kept)

    def _drop(self, *steps: int) -> None:
        """Renamed first: what has its final name is whole."""
        for done in steps:
            shutil.rmtree(self._path(done).rename(self._partial(done)))


def _reason(error: BaseException) -> str:
    """The kind and the beginning of an error; of torch's collected ones, the first rank's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)
