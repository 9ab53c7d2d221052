"""How far `data index` is: a bar on a terminal, a line every few seconds anywhere else."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_SECONDS = 10.0
_SPEED_SECONDS = 300.0
"""Pieces end seldom and together; a shorter time would make the speed jump."""


class IndexProgress:
    """Told of every finished piece.

    Args:
        total: bytes of all inputs.
        done: of them, bytes that an earlier run has finished.
    """

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.fields[documents]:,} documents"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task("", total=total, completed=done, documents=0)
        self._total, self._done, self._fresh, self._documents = total, done, 0, 0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, nbytes: int, documents: int) -> None:
        """A piece is finished."""
        self._fresh += nbytes
        self._documents += documents
        self._bar.update(self._task, advance=nbytes, documents=self._documents)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= _LINE_SECONDS:
            self._last = now
            self._console.print(self._line(now - self._start), highlight=False)

    def _line(self, seconds: float) -> str:
        done = self._done + self._fresh
        speed = self._fresh / seconds
        return (
            f"{100 * done / self._total:.0f} %, {self._documents:,} documents, {speed / 1e6:.1f} MB/s, "
            f"{(self._total - done) / speed:.0f} s left"
        )
