"""JSONL files for the tests of this folder."""

import json
from pathlib import Path
from typing import Any, ClassVar

from megatron_r1.config import component
from megatron_r1.config.section import Component
from megatron_r1.data.tasks.general import General
from megatron_r1.data.tasks.records import RecordsTask


class Strict(General):
    """A user's task whose default reward has the name of a built-in task's, and other settings."""

    default_rewards: ClassVar[dict[str, Component]] = {"format": {"type": "format", "answer_in": "after_think"}}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(kind: str, folder: Path, rows: list[dict[str, Any]], **keys: Any) -> RecordsTask:
    """A task over `rows`."""
    task = component.build("task", {"type": kind, "source": write(folder / f"{kind}.jsonl", rows), **keys})
    assert isinstance(task, RecordsTask)
    return task
