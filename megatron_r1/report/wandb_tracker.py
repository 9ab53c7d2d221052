"""Metrics in Weights & Biases: online, or offline for `wandb sync` later. It never asks a question."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from megatron_r1.config.sections import ReportSection
from megatron_r1.errors import ConfigError
from megatron_r1.report.journal import replace_text

RUN_ID = "wandb_id"


class WeightsAndBiases:
    """One wandb run for one run directory: its id is kept there, so that a resumed run goes on in the same one."""

    def __init__(self, section: ReportSection, output: Path, title: str, config: dict[str, Any]) -> None:
        if section.wandb == "online" and not wandb.login(prompt=False):
            raise ConfigError(
                'report.wandb = "online" needs an account: run `wandb login`, or set WANDB_API_KEY, '
                'or use report.wandb = "offline" and `wandb sync` later'
            )
        self._run = wandb.init(
            mode="online" if section.wandb == "online" else "offline",
            project=section.wandb_project,
            name=f"{output.name}: {title}",
            dir=output,
            id=_run_id(output),
            resume="allow",
            config=config,
            settings=wandb.Settings(silent=True, console="off", disable_code=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The training step is an axis of its own, because wandb's own may not go back on resume."""
        self._run.log({"step": step, **figures})

    def summary(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(figures))

    def close(self) -> None:
        self._run.finish()


def _run_id(output: Path) -> str:
    path = output / RUN_ID
    if not path.exists():
        replace_text(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
