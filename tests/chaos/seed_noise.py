"""Held-out accuracy of a disturbed run beside undisturbed ones that differ in their seed alone."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Accuracies:
    """Of one disturbed run and of undisturbed ones, all begun from one model and asked the same held-out questions."""

    base: float
    """Before the first step."""
    disturbed: float
    undisturbed: Sequence[float]
    """One for each seed."""
    answers: int
    """To held-out questions, of each evaluation: questions x samples of each."""

    @property
    def expected(self) -> tuple[float, float]:
        """Where one more undisturbed run may lie: ``[min - 2 s(min), max + 2 s(max)]``.

        Minimum and maximum are those of the undisturbed runs: what seeds do to training. ``s(p) = sqrt(p (1 - p) /
        answers)`` is the binomial standard error: what seeds do to the answers. It is not that of the questions, which
        all runs have in common.
        """
        low, high = min(self.undisturbed), max(self.undisturbed)
        return max(0.0, low - 2 * self._error(low)), min(1.0, high + 2 * self._error(high))

    def wrong(self) -> list[str]:
        """What speaks against "as good as undisturbed": the disturbed run is outside of the expected, or that says
        nothing, as a model that has learned nothing would be inside."""
        low, high = self.expected
        wrong = []
        if not low <= self.disturbed <= high:
            wrong.append(f"held-out accuracy {self.disturbed:.1%} is outside of [{low:.1%}, {high:.1%}]")
        if low <= self.base + 2 * self._error(self.base):
            wrong.append(f"undisturbed runs may end at {low:.1%}, no better than the base's {self.base:.1%}")
        return wrong

    def _error(self, accuracy: float) -> float:
        return math.sqrt(accuracy * (1 - accuracy) / self.answers)


def read(disturbed: Path, undisturbed: Sequence[Path], answers: int) -> Accuracies:
    """From the output folders of finished runs."""
    base, final = _accuracies(disturbed)
    return Accuracies(base, final, [_accuracies(output)[1] for output in undisturbed], answers)


def _accuracies(output: Path) -> tuple[float, float]:
    """Before the first step, and after the last."""
    figures = json.loads((output / "summary.json").read_text())
    return figures["heldout_accuracy_base"], figures["heldout_accuracy_final"]
