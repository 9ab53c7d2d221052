"""How far a conversion is: a bar on a terminal, a plain line every few seconds anywhere else."""

import threading
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_r1.report.catalogue import duration

LINE_SECONDS = 5.0


class Display(Protocol):
    """Told of every tensor's bytes, from any thread."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def advance(self, nbytes: int) -> None: ...


class Bar:
    """A live bar with speed and time left."""

    def __init__(self, stream: TextIO, title: str, total: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            expand=True,
        )
        self._task = self._progress.add_task(title, total=total, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, nbytes)


class Lines:
    """For logs: no control characters."""

    def __init__(self, stream: TextIO, title: str, total: int, done: int) -> None:
        self._stream, self._title, self._total, self._first, self._done = stream, title, total, done, done
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        resumed = f", going on at {gigabytes(self._first)}" if self._first else ""
        self._write(f"{self._title}: {gigabytes(self._total)}{resumed}")
        return self

    def __exit__(self, *_: object) -> None:
        self._line(time.monotonic())

    def advance(self, nbytes: int) -> None:
        """Count, and write a line if one is due."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last >= LINE_SECONDS:
                self._last = now
                self._line(now)

    def _line(self, now: float) -> None:
        seconds, fresh = now - self._start, self._done - self._first
        left = (
            f", left {duration(seconds / fresh * (self._total - self._done))}"
            if 0 < fresh < self._total - self._first
            else ""
        )
        share = 100 * self._done / max(self._total, 1)
        self._write(f"{self._title}: {share:.0f} %, {gigabytes(self._done)} in {duration(seconds)}{left}")

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def open_display(stream: TextIO, title: str, total: int, done: int) -> Display:
    """A bar if `stream` is a terminal, lines otherwise.

    Args:
        stream: where it is shown.
        title: what is done.
        total: bytes in all.
        done: of them, bytes that an earlier run has written.
    """
    return (Bar if stream.isatty() else Lines)(stream, title, total, done)


def gigabytes(nbytes: float) -> str:
    """`688.57 GB`, `12.3 MB`: decimal, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.2f} GB"
