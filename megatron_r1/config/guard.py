"""[guard]: what is done about losses and gradients that are not finite or out of line, and about ranks that hang."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from megatron_r1.config.section import Section

PHASES = (
    "start",
    "data",
    "rollout",
    "reward",
    "logprobs",
    "update",
    "sync",
    "validation",
    "evaluation",
    "checkpoint",
    "export",
)
"""What runs name the parts of their steps, and what comes before the first and after the last one."""


class _Guard(Section):
    """What all training verbs have."""

    spike_sigma: PositiveFloat = 6.0
    """A loss or gradient norm is a spike when it lies this many standard deviations above the median of the window;
    the deviation is estimated from the median absolute deviation (Hampel's identifier)."""
    window: PositiveInt = Field(default=128, ge=4)
    """Updates that a new one is compared with; none is judged before half of them have been made."""
    max_skips: PositiveInt = 3
    """Updates that may be skipped in a row; one more stops the run."""
    deadline: PositiveFloat = 3600.0
    """Seconds that a phase of a step may take, on any rank, before the run ends with the name of the rank that the
    others wait for."""
    deadlines: dict[str, PositiveFloat] = {}
    """The same for single phases, such as `{ update = 120, rollout = 86400 }`. The names are those of the times in
    metrics.jsonl. `start` (until the first step), `rollout`, `evaluation` and `export` have a day unless named here."""

    @field_validator("deadlines")
    @classmethod
    def _known(cls, deadlines: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(set(deadlines) - set(PHASES)):
            raise ValueError(f"no phase is called {', '.join(unknown)}; there are {', '.join(PHASES)}")
        return deadlines


class GuardSection(_Guard):
    """[guard] of the verbs that train on few data, or on data that the policy makes itself."""

    non_finite: Literal["stop", "skip"] = "stop"
    """What is done with an update whose loss or gradient is not finite. It never reaches the weights."""
    spike: Literal["off", "warn", "skip", "stop"] = "off"
    """What is done about a spike."""


class PretrainGuardSection(_Guard):
    """[guard] of `pretrain`."""

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """What is done with an update whose loss or gradient is not finite. It never reaches the weights. "rewind" is for
    numbers that have gone wrong for some steps before: it does as at a spike."""
    spike: Literal["off", "warn", "skip", "rewind", "stop"] = "warn"
    """What is done about a spike. "skip" leaves the update out. "rewind" goes back to a checkpoint from before it and
    jumps over the batches that were read since (PaLM, arXiv 2204.02311, 5.1)."""
    rewind_steps: PositiveInt = 100
    """The checkpoint gone back to is at least so many steps older than the bad update, or the oldest that is kept."""
    max_rewinds: PositiveInt = 10
    """Rewinds of the whole run; one more stops it."""
