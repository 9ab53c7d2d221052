"""Plans of verbs that only sample from finished models: engines that fit, and the time of so many samples."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_r1.config.plan import PlanSection
from megatron_r1.config.sections import RolloutSection
from megatron_r1.model.family import HFConfig
from megatron_r1.model.memory import Shape
from megatron_r1.plan.fleet import Asked, FleetPlan, fleet
from megatron_r1.plan.hardware import H100, Hardware
from megatron_r1.plan.layouts import Finding
from megatron_r1.plan.movement import Transfer
from megatron_r1.plan.run_file import PROMPT
from megatron_r1.plan.tensors import count


@dataclass(frozen=True)
class ServedPlan:
    """Engines of each model, one model after another."""

    models: dict[str, str]
    """Name -> architecture."""
    fleets: dict[str, FleetPlan]

    @property
    def all_gpus(self) -> int:
        """Of the largest fleet."""
        return max(one.gpus for one in self.fleets.values())

    @property
    def findings(self) -> list[Finding]:
        """Of all."""
        return [replace(one, text=f"{name}: {one.text}") for name, own in self.fleets.items() for one in own.findings]

    @property
    def seconds(self) -> float | None:
        """Of all samples; None where their number is not known."""
        known = all(one.rollout_seconds for one in self.fleets.values())
        return sum(one.seconds for one in self.fleets.values()) if known else None

    @property
    def gpu_hours(self) -> float | None:
        """Of all samples."""
        known = all(one.rollout_seconds for one in self.fleets.values())
        return sum(one.seconds * one.gpus for one in self.fleets.values()) / 3600 if known else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "models": self.models,
            "gpus": self.all_gpus,
            "fits": not self.findings,
            "findings": [vars(finding) for finding in self.findings],
            "fleets": {name: one.as_dict() for name, one in self.fleets.items()},
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
        }


def plan_served(
    models: dict[str, tuple[HFConfig, RolloutSection]], options: PlanSection, hardware: Hardware = H100
) -> ServedPlan:
    """The plan of engines that load a model and sample from it.

    Args:
        models: name -> its `config.json`, and its [rollout].
        options: lengths, and how many samples are drawn from each.
        hardware: where.

    Raises:
        DataError: an unsupported `config.json`.
    """
    fleets, names = {}, {}
    for name, (hf, section) in models.items():
        shape, names[name] = Shape.of(hf), hf["architectures"][0]
        counts = count(shape)
        mean = options.mean_tokens or section.max_model_len // 4
        asked = Asked(options.samples or 0, min(PROMPT, mean // 2), mean, options.spread)
        own = fleet(shape, section, asked, counts, hardware)
        nodes = max(1, own.gpus // hardware.gpus_per_node)
        read = Transfer(own.sync.bytes, own.sync.bytes / hardware.storage / nodes * own.engines, "read from storage")
        fleets[name] = replace(own, sync=read)
    return ServedPlan(names, fleets)
