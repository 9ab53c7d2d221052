"""A report into a temporary run directory, and groups to show in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.sections import ReportSection
from megatron_r1.report.run import Report
from megatron_r1.types import Group, Question, Sample

CONFIG = 'seed = 3\n\n[optim]\nlr = 0.001\nname = "<b>&"\n'


@pytest.fixture
def open_report(tmp_path: Path) -> Callable[..., Report]:
    """A factory: every report it opens writes to the same run directory unless told otherwise."""

    def build(output: Path | None = None, steps: int = 6, **options: Any) -> Report:
        given = {"console": False, "tensorboard": False, **options.pop("section", {})}
        return Report(output or tmp_path / "run", ReportSection(**given), "A run", steps, CONFIG, **options)

    return build


@pytest.fixture
def group() -> Callable[..., Group]:
    """A factory of one question with one response."""

    def build(text: str, name: str = "q-1", prompt: str = "User: 3 + 4? Assistant:", reward: float = 1.0) -> Group:
        sample = Sample([5, 6], [-0.1, -0.2], text, True, 0, {"accuracy": reward, "language": None}, reward)
        return Group(Question(name, "arithmetic", prompt, "7"), [1, 2], [sample])

    return build
