"""Losses and gradients that are not finite, and spikes: noticed before the update, then skipped, rewound or stopped.

::

    gradients -> norm -> Guard.judge -- yes --> clip, update
                              |
                              no: the weights stay as they are, the batch is saved, the policy of [guard] is followed

The rule for spikes is that of OLMo-core's SkipStepOptimizer (above `sigma` deviations of the last 128 steps, loss or
gradient norm, not before half of them are there), with median and median absolute deviation for mean and standard
deviation: a spike in the window then does not hide the next one, and a lasting change is the new normal after half a
window. Gradient norms are skewed, so their logarithms are compared.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

import torch

from megatron_r1.config.guard import GuardSection, PretrainGuardSection
from megatron_r1.data.files import aside
from megatron_r1.errors import NumericsError
from megatron_r1.train.batch import Minibatch

Judge = Callable[[float | None, float], bool]
"""Loss (None where it is no measure) and gradient norm of an update -> whether it is made."""
Figures = dict[str, float]

PREFIX = "guard/"
BAD_BATCHES = "bad_batches"
MOST_SAVED = 32
"""Bad batches that one run saves, so that a run that only warns cannot fill the disk."""

_MAD_TO_SIGMA = 1.4826
"""Standard deviation of normal data over its median absolute deviation."""
_ROUNDING = 1e-3
"""A relative deviation below this is no noise to measure a spike by: some windows are all but constant."""


class Action(Enum):
    """What is done with an update."""

    GO = "made"
    SKIP = "skipped"
    REWIND = "rewound"
    STOP = "refused"


class RewindError(Exception):
    """A bad update that the run goes back behind; the loop does so (`rewinds.py`).

    Args:
        step: the one whose update was not made.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"a bad update at step {step}")
        self.step = step


def refuse_non_finite(loss: float | None, grad_norm: float) -> bool:
    """The judge of models that have no guard.

    Raises:
        NumericsError: loss or gradient is not finite.
    """
    reason = _not_finite(loss, grad_norm)
    if reason:
        raise NumericsError(f"{reason}, so the update was refused; {_ADVICE}")
    return True


class Guard:
    """Judges the updates of one model. Same figures, same judgements: on all ranks, and after a resume.

    Args:
        section: [guard].
        output: the run's folder; bad batches are saved below it.
        rank: this process, for the name of its file.
        say: where a line about each bad update goes.
    """

    def __init__(
        self, section: GuardSection | PretrainGuardSection, output: Path, rank: int, say: Callable[[str], None]
    ) -> None:
        self._section, self._folder, self._rank, self._say = section, output / BAD_BATCHES, rank, say
        self._losses: deque[float] = deque(maxlen=section.window)
        self._norms: deque[float] = deque(maxlen=section.window)
        self._in_a_row = self._saved = 0
        self._action, self._reason = Action.GO, ""

    def judge(self, loss: float | None, grad_norm: float) -> bool:
        """Whether the update with these figures is made. What else is to be done, `follow_up` does."""
        section = self._section
        self._reason = _not_finite(loss, grad_norm)
        if self._reason:
            self._action = Action[section.non_finite.upper()]
        else:
            self._reason = "" if section.spike == "off" else self._spike(loss, grad_norm)
            self._action = Action.GO
            if self._reason and section.spike != "warn":
                self._action = Action[section.spike.upper()]
            self._norms.append(grad_norm)
            if loss is not None:
                self._losses.append(loss)
        self._in_a_row = self._in_a_row + 1 if self._action is Action.SKIP else 0
        if self._in_a_row > section.max_skips:
            self._reason += f", and max_skips = {section.max_skips} updates before it were skipped"
            self._action = Action.STOP
        return self._action is Action.GO

    def follow_up(self, step: int, minibatch: Minibatch, losses: Callable[[Minibatch], Sequence[torch.Tensor]]) -> None:
        """Save the batch of a bad update, say what was done, and stop or rewind where that is the policy.

        All ranks call this after each update.

        Args:
            step: the one that the update is of.
            minibatch: this rank's part of it.
            losses: what the model makes of each selected token, nats; called for a bad update only.

        Raises:
            NumericsError: the policy is to stop.
            RewindError: the policy is to rewind.
        """
        if not self._reason:
            return
        where = ""
        if self._saved < MOST_SAVED:
            folder = self._folder / f"step_{step:08d}"
            _save(folder / f"rank_{self._rank}.pt", minibatch, losses(minibatch), self._reason, self._action)
            where = f"; the batch is in {folder}"
        self._saved += 1
        text = f"step {step}: {self._reason}, so the update was {self._action.value}{where}"
        if self._action is Action.GO:
            text = f"warning: step {step}: {self._reason}{where}"
        if self._action is Action.STOP:
            raise NumericsError(f"{text}. {_ADVICE[0].upper()}{_ADVICE[1:]}")
        self._say(text)
        if self._action is Action.REWIND:
            raise RewindError(step)

    def state(self) -> Figures:
        """What a checkpoint has to keep, among the figures of the loop."""
        named = {f"{PREFIX}loss/{n:04d}": value for n, value in enumerate(self._losses)}
        named |= {f"{PREFIX}grad_norm/{n:04d}": value for n, value in enumerate(self._norms)}
        return named | {f"{PREFIX}in_a_row": float(self._in_a_row), f"{PREFIX}saved": float(self._saved)}

    def restore(self, figures: Figures) -> Figures:
        """Take over what `state` gave from a checkpoint's figures; returns the others."""
        own = {name.removeprefix(PREFIX): value for name, value in figures.items() if name.startswith(PREFIX)}
        for values, prefix in ((self._losses, "loss/"), (self._norms, "grad_norm/")):
            values.clear()
            values.extend(own[name] for name in sorted(own) if name.startswith(prefix))
        self._in_a_row, self._saved = int(own.get("in_a_row", 0)), int(own.get("saved", 0))
        return {name: value for name, value in figures.items() if not name.startswith(PREFIX)}

    def _spike(self, loss: float | None, grad_norm: float) -> str:
        """What is out of line, in words; empty if nothing is."""
        found = []
        if loss is not None and self._above(self._losses, loss, _ROUNDING * abs(loss)):
            found.append(f"the loss {loss:.6g} is {self._usual(self._losses)}")
        if grad_norm > 0 and self._above([math.log(n) for n in self._norms if n > 0], math.log(grad_norm), _ROUNDING):
            found.append(f"the gradient norm {grad_norm:.6g} is {self._usual(self._norms)}")
        return " and ".join(found)

    def _above(self, window: Sequence[float], value: float, smallest_sigma: float) -> bool:
        if len(window) < self._section.window // 2:
            return False
        median = statistics.median(window)
        sigma = _MAD_TO_SIGMA * statistics.median(abs(other - median) for other in window)
        return value - median > self._section.spike_sigma * max(sigma, smallest_sigma)

    def _usual(self, window: Sequence[float]) -> str:
        sigma, usual = self._section.spike_sigma, statistics.median(window)
        return f"more than {sigma:g} deviations above the {usual:.6g} of the last {len(window)} updates"


_ADVICE = (
    "the last checkpoint is intact. Lower lr or clip_grad of [optim] (a critic's: [critic.optim]), or look for the "
    "step where grad_norm began to rise"
)


def _not_finite(loss: float | None, grad_norm: float) -> str:
    if loss is not None and not math.isfinite(loss):
        return f"the loss is {loss}"
    return "" if math.isfinite(grad_norm) else "a gradient is not finite"


def _save(path: Path, minibatch: Minibatch, losses: Sequence[torch.Tensor], reason: str, action: Action) -> None:
    """One rank's part of a batch, for `torch.load`: tensors on the CPU, by the names of `MicroBatch`."""
    batch = []
    for number, micro in enumerate(minibatch):
        fields = {**vars(micro), **vars(micro.inputs)}
        entry = {name: value for name, value in fields.items() if isinstance(value, list | torch.Tensor)}
        if number < len(losses):  # only the last pipeline stage knows them
            entry["loss"] = losses[number]
        batch.append({name: _on_cpu(value) for name, value in entry.items()})
    with aside(path) as partial:
        torch.save({"microbatches": batch, "reason": reason, "update": action.value}, partial)


def _on_cpu(value: object) -> object:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
