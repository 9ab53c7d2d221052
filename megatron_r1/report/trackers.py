"""Where metrics go besides the run directory's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.sections import ReportSection


class Tracker(Protocol):
    """Takes the metrics of one step at a time."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def summary(self, figures: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    section: ReportSection, output: Path, title: str, config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The trackers that [report] asks for; one that is not asked for is not imported either."""
    trackers: list[Tracker] = []
    if section.tensorboard:
        from megatron_r1.report.tensorboard_tracker import TensorBoard

        trackers.append(TensorBoard(output / "tensorboard", resume_step))
    if section.wandb != "off":
        from megatron_r1.report.wandb_tracker import WeightsAndBiases

        trackers.append(WeightsAndBiases(section, output, title, config))
    if section.prometheus_port:
        from megatron_r1.report.prometheus_tracker import Prometheus

        trackers.append(Prometheus(section.prometheus_address, section.prometheus_port, output.name))
    return trackers
