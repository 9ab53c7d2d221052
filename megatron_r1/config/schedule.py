"""Settings that change while a run goes on, and when: after a number of tokens, or of steps."""

from itertools import pairwise
from typing import Annotated, Any, Literal, overload

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, NonNegativeFloat, PositiveInt, Tag

from megatron_r1.config.section import Section


def _whole(value: Any) -> Any:
    """TOML reads 10e12 as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[PositiveInt, BeforeValidator(_whole)]
"""A count of tokens; `10e12` and `10_000_000_000_000` are the same."""


class Piece(Section):
    """A value, and how long it holds."""

    value: NonNegativeFloat
    until_tokens: Tokens | None = None
    """Tokens of the whole run after which the next value holds; None = to the end of the run."""


class StepPiece(Section):
    """A whole number, and how long it holds."""

    value: PositiveInt
    until_step: PositiveInt | None = None
    """Steps of the whole run after which the next value holds; None = to the end of the run."""


def _by_tokens(pieces: list[Piece]) -> list[Piece]:
    _refuse_gaps([piece.until_tokens for piece in pieces], "until_tokens")
    return pieces


def _by_steps(pieces: list[StepPiece]) -> list[StepPiece]:
    _refuse_gaps([piece.until_step for piece in pieces], "until_step")
    return pieces


def _refuse_gaps(ends: list[int | None], key: str) -> None:
    if None in ends[:-1]:
        raise ValueError(f"only the last value can do without `{key}`: what follows it would never hold")
    if ends[-1] is not None:
        raise ValueError(f"the last value has `{key}`, but nothing follows it: leave it out there")
    _refuse_falling([end for end in ends if end is not None], key)


def _refuse_falling(ends: list[int], key: str) -> None:
    for end, following in pairwise(ends):
        if following <= end:
            raise ValueError(f"`{key}` counts from the start of the run, so it has to grow: {following} follows {end}")


_KIND = Discriminator(lambda value: "values" if isinstance(value, list) else "number")

Piecewise = Annotated[
    Annotated[NonNegativeFloat, Tag("number")]
    | Annotated[list[Piece], Field(min_length=1), AfterValidator(_by_tokens), Tag("values")],
    _KIND,
]
"""A number, or one that changes: `[{ value = 0.3, until_tokens = 10e12 }, { value = 0.1 }]`."""

Stepwise = Annotated[
    Annotated[PositiveInt, Tag("number")]
    | Annotated[list[StepPiece], Field(min_length=1), AfterValidator(_by_steps), Tag("values")],
    _KIND,
]
"""A whole number, or one that changes: `[{ value = 32768, until_step = 512 }, { value = 65536 }]`."""


def value_at(piecewise: float | list[Piece], tokens: int) -> float:
    """What holds for the step before which the run has consumed `tokens`."""
    if not isinstance(piecewise, list):
        return piecewise
    return next(piece.value for piece in piecewise if piece.until_tokens is None or tokens < piece.until_tokens)


def value_at_step(stepwise: int | list[StepPiece], step: int) -> int:
    """What holds in a step; 0 is the first."""
    if not isinstance(stepwise, list):
        return stepwise
    return next(piece.value for piece in stepwise if piece.until_step is None or step < piece.until_step)


def shares(stepwise: int | list[StepPiece], steps: int) -> dict[int, float]:
    """Every value of a run of so many steps, and the share of them in which it holds."""
    if not isinstance(stepwise, list):
        return {stepwise: 1.0}
    found: dict[int, float] = {}
    begin = 0
    for piece in stepwise:
        end = steps if piece.until_step is None else min(piece.until_step, steps)
        if end > begin:
            found[piece.value] = found.get(piece.value, 0.0) + (end - begin) / steps
        begin = max(begin, end)
    return found


@overload
def largest(changing: int | list[StepPiece]) -> int: ...


@overload
def largest(changing: float | list[Piece]) -> float: ...


def largest(changing: float | list[Piece] | list[StepPiece]) -> float:
    """The largest value of a run; 0 = never on."""
    return max(piece.value for piece in changing) if isinstance(changing, list) else changing


class Phase(Section):
    """[[optim.phases]]: what the learning rate does until the next phase."""

    lr: NonNegativeFloat | None = None
    """The rate at the end of the phase. Default: the one that it begins with, which is `optim.lr` in the first phase
    and the end of the phase before in any other."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it gets there: at once, or along a line or half a cosine from the rate that it begins with."""
    until_tokens: Tokens | None = None
    """Tokens of the whole run, at whose end the next phase begins."""
    until_step: PositiveInt | None = None
    """The same in optimizer steps; a run has phases in tokens or in steps."""

    @property
    def end(self) -> int | None:
        """Where it ends, in its unit; None = with the run."""
        return self.until_step if self.until_tokens is None else self.until_tokens


def _in_order(phases: list[Phase]) -> list[Phase]:
    keys = {key for key in ("until_tokens", "until_step") for phase in phases if getattr(phase, key) is not None}
    if len(keys) > 1:
        raise ValueError("phases end after tokens or after steps: use `until_tokens` in all of them or `until_step`")
    for number, phase in enumerate(phases, 1):
        if phase.end is None and number < len(phases):
            raise ValueError(f"phase {number} never ends: give it `until_tokens` or `until_step`")
        if phase.schedule != "constant" and (phase.end is None or phase.lr is None):
            raise ValueError(
                f"phase {number} is {phase.schedule!r}, which needs `lr`, the rate that it ends with, and its end, "
                "`until_tokens` or `until_step`"
            )
    _refuse_falling([phase.end for phase in phases if phase.end is not None], next(iter(keys), ""))
    return phases


Phases = Annotated[list[Phase], AfterValidator(_in_order)]
"""Phases of the learning rate, one behind the other; behind the last it stays as it is."""


class BatchRampSection(Section):
    """[batch_ramp]: a batch that grows to `batch` in equal parts of the first `tokens` (DeepSeek-V3, 4.2)."""

    start: PositiveInt
    """Sequences of the first step."""
    tokens: Tokens
    """After so many tokens the batch has its full size."""
    increment: PositiveInt | None = None
    """Sequences by which it grows. Default: `start`."""

    def sizes(self, batch: int) -> list[int]:
        """Every size of a batch that ends with `batch` sequences.

        Raises:
            ValueError: `batch` is not reached.
        """
        increment = self.increment or self.start
        if self.start >= batch or (batch - self.start) % increment:
            raise ValueError(
                f"a batch ramp from {self.start} in increments of {increment} does not reach batch {batch}"
            )
        return [*range(self.start, batch, increment), batch]
