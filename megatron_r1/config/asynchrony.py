"""How far sampling may run ahead of training, and what corrects for it: two sections of `rl`'s run file."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from megatron_r1.config.engine_arguments import by_name, ranks
from megatron_r1.config.section import Section
from megatron_r1.config.sections import RolloutSection

WeightsChange = Literal["in_flight", "partial_rollouts", "at_group_borders"]


class AheadSection(RolloutSection):
    """[rollout] of `rl`: the fleet, and how far it runs ahead of training (`docs/asynchrony.md`)."""

    max_staleness: NonNegativeInt = 0
    """k: a step trains on groups that weights of at most so many steps before have begun. 0 = the fleet waits while the
    learner trains, and the learner while the fleet samples; above 0 both work at once."""
    late: Literal["wait", "drop", "keep"] = "wait"
    """What a step does about groups that it would have to wait for: `wait` for them; `drop` them and ask other
    questions, which prefers short answers; `keep` them for a later step, however stale they are then."""
    over_sampling: NonNegativeInt = 0
    """Questions asked beyond those that steps have room for, with `late = "drop"` or `"keep"`: a step takes the first
    groups that are complete. At `max_staleness = 0`, too."""
    weights_change: WeightsChange = "in_flight"
    """What becomes of unfinished responses at new weights. `in_flight`: they go on with them where they are, in the
    engine. `partial_rollouts`: they come back as far as they are, and go on with them on whichever engine has room; a
    checkpoint has them. `at_group_borders`: an engine ends the groups that it has before it takes new weights."""

    routing_replay: bool = False
    """A mixture of experts is trained with the experts that the engine has sent each token to, not with those that the
    learner's routers would choose (docs/algorithms.md)."""

    fp8_path: Path | None = None
    """A folder with the model in DeepSeek's FP8, as it was released or as `megatron-r1 cast --dtype=fp8` makes it:
    engines start on it, and the learner sends new weights in its numbers, half the bytes (docs/fleet.md). None =
    engines start on `model.path`, and weights are sent in `model.dtype`."""

    @property
    def returns_experts(self) -> bool:
        """See `RolloutSection`."""
        return self.routing_replay

    @property
    def serves_fp8(self) -> bool:
        """See `RolloutSection`."""
        return self.fp8_path is not None

    def served(self, model: Path) -> Path:
        """See `RolloutSection`."""
        return self.fp8_path or model

    @property
    def ahead(self) -> bool:
        """Whether groups are begun that the next step may not train on."""
        return self.max_staleness > 0 or self.over_sampling > 0

    @model_validator(mode="after")
    def _recordable(self) -> "AheadSection":
        if self.routing_replay:
            if ranks(self.arguments)[1] > 1:
                raise ValueError("routing_replay: vLLM does not record the experts of engines with pipeline stages")
            if "no-enable-prefix-caching" in by_name(self.arguments):
                raise ValueError("routing_replay: vLLM keeps what it records beside the prefix cache, which is off")
        return self

    @model_validator(mode="after")
    def _asynchronous(self) -> "AheadSection":
        if not self.ahead:
            for name, usual in (("late", "wait"), ("weights_change", "in_flight")):
                if getattr(self, name) != usual:
                    raise ValueError(f"{name} = {getattr(self, name)!r} goes with max_staleness above 0")
            return self
        asked = "max_staleness" if self.max_staleness else "over_sampling"
        if self.sleep:
            raise ValueError(f"{asked} above 0 has engines work while the learner does: they cannot sleep then")
        if self.dispatch != "continuous":
            raise ValueError(
                f'{asked} above 0 needs dispatch = "continuous": with "batch" an engine gets nothing before all have '
                "finished what they were given"
            )
        if self.over_sampling and self.late == "wait":
            raise ValueError(
                'over_sampling needs late = "drop" or "keep": with "wait" a step waits for all that is asked, and the '
                "first groups that are complete are of no use"
            )
        return self


class CorrectionSection(Section):
    """[correction]: weights of tokens for having been sampled by older weights, or by an engine that rounds otherwise.

    The ratio is that of the learner's policy at the beginning of a step to the one that has sampled, as the engine gave
    its log-probability; see `loss/importance.py` for what is made of it.
    """

    kind: Literal["none", "token", "sequence"] = "none"
    """Ratios of single tokens, or of whole responses (the product). Default: `token` with `rollout.max_staleness`
    above 0 or `late = "keep"`, else `none`."""
    outside: Literal["cap", "drop"] = "cap"
    """What becomes of a ratio out of bounds: `cap` brings it down to `cap`; `drop` leaves the token (or the response)
    out of the gradient."""
    cap: PositiveFloat = 2.0
    """Upper bound of the ratio."""
    floor: NonNegativeFloat = 0.0
    """Lower bound, with `outside = "drop"`."""

    @model_validator(mode="after")
    def _bounded(self) -> "CorrectionSection":
        if self.floor and self.outside != "drop":
            raise ValueError('floor goes with outside = "drop": a small ratio that is not dropped is right as it is')
        if self.floor >= self.cap:
            raise ValueError(f"floor {self.floor:g} is not below cap {self.cap:g}")
        return self
