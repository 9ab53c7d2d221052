"""Going back before a spike, and the rows that are jumped over since.

Which rows a step takes is a function of how many rows the steps before it take: its position. Without rewinds position
n is row n. A rewind from step s to the checkpoint c makes c go on with the row behind the last of s; what was read in
between is never read again. PaLM did the same by hand, some 20 times, skipping 200 to 500 batches (arXiv 2204.02311,
5.1): the same batches did no harm from another checkpoint, so a spike comes of the batches and the weights together.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.config.guard import PretrainGuardSection
from megatron_r1.data.files import write_json
from megatron_r1.errors import DataError, NumericsError

FILE = "skipped_rows.json"
_KEYS = ("step", "checkpoint", "first", "last")


class Rewinds:
    """Which row stands at each position.

    Args:
        output: the run's folder. The list is kept in it and not in checkpoints, since a rewind loads an old one.
        rows: of the whole run. One that jumps over some takes the first ones again at its end.
        anew: the run begins at step 0, and a list that is there is of an earlier one.

    Raises:
        DataError: the list cannot be read.
    """

    def __init__(self, output: Path, rows: int, anew: bool) -> None:
        self._path, self._rows = output / FILE, rows
        self._made = [] if anew or not self._path.exists() else _read(self._path)
        self._skipped = _ranges(self._made)

    def row(self, position: int) -> int:
        """The number of the row at a position."""
        number = position % (self._rows - _count(self._skipped))
        for first, last in self._skipped:
            if number >= first:
                number += last - first + 1
        return number

    def target(self, step: int, checkpoints: Sequence[int], section: PretrainGuardSection) -> int:
        """The checkpoint, of those that are whole, to go back to from a step.

        Raises:
            NumericsError: there is none, or the run has gone back too often.
        """
        before = sorted(done for done in checkpoints if done <= step)
        if not before:
            raise NumericsError(f"a bad update at step {step}, before the first checkpoint; lower lr of [optim]")
        if len(self._made) >= section.max_rewinds:
            raise NumericsError(
                f"a bad update at step {step} after max_rewinds = {section.max_rewinds} rewinds: other batches do not "
                "help. Lower lr of [optim], or look at bad_batches/"
            )
        return max((done for done in before if done <= step - section.rewind_steps), default=before[0])

    def add(self, step: int, target: int, start: int, end: int) -> None:
        """Jump over the positions `start` to `end - 1`, read from the checkpoint `target` on until the bad update.

        All ranks call this, once no checkpoint after `target` is left: they know of other rows.

        Raises:
            NumericsError: nothing would be left to train on.
        """
        entry = {"step": step, "checkpoint": target, "first": self.row(start), "last": self.row(end - 1)}
        skipped = _ranges([*self._made, entry])
        if entry["last"] < entry["first"] or _count(skipped) >= self._rows:
            raise NumericsError(f"a bad update at step {step}, and hardly any rows are left that were not skipped")
        self._made, self._skipped = [*self._made, entry], skipped

    def save(self) -> None:
        """Write the list down. The first rank alone calls this, after `add`."""
        write_json(self._path, self._made)


def _ranges(made: list[dict[str, int]]) -> list[tuple[int, int]]:
    """First and last of each run of skipped rows, ascending; a later rewind may hold an earlier one."""
    ranges: list[tuple[int, int]] = []
    for first, last in sorted((entry["first"], entry["last"]) for entry in made):
        if not ranges or last > ranges[-1][1]:
            ranges.append((first, last))
    return ranges


def _count(ranges: list[tuple[int, int]]) -> int:
    return sum(last - first + 1 for first, last in ranges)


def _read(path: Path) -> list[dict[str, int]]:
    try:
        return [{key: int(entry[key]) for key in _KEYS} for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a list of skipped rows ({error!r}); restore it to go on") from error
