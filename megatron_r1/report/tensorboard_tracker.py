"""Metrics as TensorBoard event files, written without importing torch or TensorFlow."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoard:
    """Scalars under `folder`. A resumed run tells the reader to discard what it is about to repeat."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=resume_step, session_log=start))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One event with every finite number of `figures`."""
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in figures.items() if math.isfinite(value)
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """TensorBoard has no place for a run's final figures."""

    def close(self) -> None:
        self._writer.close()
