"""How many rows each optimizer step takes: a function of the step, so a resumed run needs no cursor."""

from bisect import bisect_right
from dataclasses import dataclass

from megatron_r1.config.schedule import BatchRampSection


@dataclass(frozen=True)
class _Level:
    """Steps of one batch size."""

    step: int
    row: int
    batch: int


class Ramp:
    """The batch of each step. (DeepSeek-V3, arXiv 2412.19437, 4.2: 3072 to 15360 sequences in the first 469 B tokens.)

    A step's batch is decided by the tokens before it. Sizes do not depend on how many ranks there are, so a run can go
    on in another layout.

    Args:
        section: the run's [batch_ramp]; None = `batch` from the first step on.
        batch: sequences of a step at the end of the ramp.
        sequence_length: tokens of a sequence.

    Raises:
        ValueError: the ramp does not reach `batch`.
    """

    def __init__(self, section: BatchRampSection | None, batch: int, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.sizes = section.sizes(batch) if section else [batch]
        """Every batch that may come; each has to divide among the ranks."""
        self.identity = {
            "batch": batch,
            "sequence_length": sequence_length,
            "batch_ramp.start": self.sizes[0],
            "batch_ramp.tokens": section.tokens if section else 0,
            "batch_ramp.sizes": len(self.sizes),
        }
        """What must not change while a run goes on."""
        self._levels: list[_Level] = []
        step = row = 0
        for number, size in enumerate(self.sizes[:-1], 1):
            # Rows that are consumed when the ramp is number / increments through, rounded up.
            end = -(-number * section.tokens // ((len(self.sizes) - 1) * sequence_length)) if section else 0
            steps = max(0, -(-(end - row) // size))
            if steps:
                self._levels.append(_Level(step, row, size))
            step, row = step + steps, row + steps * size
        self._levels.append(_Level(step, row, batch))

    def batch(self, step: int) -> int:
        """Rows of a step."""
        return self._level(step).batch

    def rows_before(self, step: int) -> int:
        """Rows of all the steps before it."""
        level = self._level(step)
        return level.row + (step - level.step) * level.batch

    def tokens_before(self, step: int) -> int:
        """Tokens of all the steps before it."""
        return self.rows_before(step) * self.sequence_length

    def steps(self, tokens: int) -> int:
        """The fewest steps that consume `tokens`: the inverse of `tokens_before`."""
        rows = -(-tokens // self.sequence_length)
        level = self._levels[bisect_right([level.row for level in self._levels], rows) - 1]
        return level.step - (-(rows - level.row) // level.batch)

    def _level(self, step: int) -> _Level:
        return self._levels[bisect_right([level.step for level in self._levels], step) - 1]
