"""Ranks that hang, are stopped or die are noticed and named.

A hung rank shows as a collective that all others wait in, and what gloo or NCCL then say does not name it. So the main
thread of each rank notes its step and phase (`beat`, one assignment), and a thread of its own writes them to
`<output>/heartbeats/rank_N.json` every few seconds. The first rank whose phase lasts longer than its deadline calls the
roll by an empty `hang.txt`, and reads all files twice. A rank whose file has not changed in between is stopped, dead or
out of reach; if there is none, those that are furthest behind, and of these those that wait in no collective, hold up
the others. It says so on stderr and in `hang.txt`, and all that read this end with `HUNG`.

Files need nothing of a process group that is stuck, and outlive the processes. Clocks of machines are not compared.
"""

import contextlib
import errno
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from megatron_r1.config.guard import GuardSection, PretrainGuardSection
from megatron_r1.errors import DataError, UserError
from megatron_r1.wording import counted

HUNG = 69
"""Exit code of a run that a deadline has ended (EX_UNAVAILABLE of sysexits.h)."""
FOLDER = "heartbeats"
HANG = "hang.txt"

_DAY = 86400.0
LONG_PHASES = {"start": _DAY, "rollout": _DAY, "evaluation": _DAY, "export": _DAY}
"""Phases that last as long as their data; their deadline, seconds."""
_LONGEST_INTERVAL = 5.0
"""Seconds between two beats; a tenth of the shortest deadline if that is less."""
_INTERVALS_OF_SILENCE = 2.5
"""A rank that has not written for so many intervals, and not for two seconds, does not run."""
_INTERVALS_OF_ROLL_CALL = 20
"""For so long the others believe that the one that has called the roll will say something."""
_SECONDS_TO_DUMP = 1.0
_FRAMES = 12
"""Innermost frames of a stack that are kept."""
_RECORD = 8192
"""Bytes of a rank's file. They are overwritten at once, so a process that is stopped leaves a whole one."""


class RankError(UserError, RuntimeError):
    """Another process of the run has died."""


@dataclass(frozen=True)
class Beat:
    """What one rank says of itself."""

    rank: int
    host: str
    pid: int
    created: float
    """Start of the process, of its host's clock: a pid is given again."""
    step: int = 0
    phase: str = "start"
    beats: int = 0
    """Phases begun so far, without those of this rank alone."""
    seconds: float = 0.0
    """Since the phase began."""
    written: int = 0
    """Goes up while the process runs."""
    stack: tuple[str, ...] = ()
    """Innermost frames of the main thread, once a deadline has passed."""

    @property
    def waits(self) -> bool:
        """Whether it waits for others, in a collective or for the handle of one."""
        return bool(self.stack) and ("distributed_c10d.py" in self.stack[-1] or ".wait(" in self.stack[-1])

    def __str__(self) -> str:
        place = f"phase {self.phase}" if self.phase else "between phases"
        return f"rank {self.rank} (host {self.host}, pid {self.pid}): step {self.step}, {place}, {self.seconds:.0f} s"


class Heartbeat:
    """Tells the others that this rank goes on, and ends it when one of them does not.

    Args:
        output: the run's folder, which all ranks see.
        section: [guard].
        rank: this process.
        ranks: how many there are.
        name: how the error begins.

    Raises:
        OSError: the disk is full, on entering.
        DataError: the folder cannot be written, on entering.
    """

    def __init__(
        self, output: Path, section: GuardSection | PretrainGuardSection, rank: int, ranks: int, name: str
    ) -> None:
        self._folder, self._section, self._ranks, self._name = output / FOLDER, section, ranks, name
        self._me = Beat(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())
        shortest = min([section.deadline, *section.deadlines.values()])
        self._interval = min(_LONGEST_INTERVAL, shortest / 10)
        self._now = (0, 0, "start")  # beats, step, phase; replaced as a whole, as another thread reads it
        self._seen, self._waited, self._written, self._called = self._now, 0.0, 0, 0
        self._main = threading.main_thread().ident or 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def beat(self, step: int, phase: str, alone: bool = False) -> None:
        """The main thread has come to this phase of this step; `alone`: other ranks do not, so it is not counted."""
        self._now = (self._now[0] + (not alone), step, phase)

    def __enter__(self) -> Self:
        try:
            self._open()
        except OSError as error:  # the first that a run writes: an output folder of another user or disk shows here
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise DataError(f"cannot write to {error.filename or self._folder}: {error.strerror}") from error
        faulthandler.register(signal.SIGUSR2, self._stacks)  # in C, so it works where the interpreter is stuck
        self._thread.start()
        return self

    def _open(self) -> None:
        self._made = missing(self._folder.parent)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = _path(self._folder, self._me.rank)
        path.unlink(missing_ok=True)
        if not self._me.rank:
            (self._folder / HANG).unlink(missing_ok=True)
        self._write()
        self._begun = path.stat().st_mtime
        self._stacks = path.with_suffix(".stack").open("w")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        if self._ranks == 1 and isinstance(error, UserError):
            leave_nothing(self._folder.parent, 1, self._made)
        if self._ranks > 1 and isinstance(error, RuntimeError) and not isinstance(error, UserError):
            if self._said():  # it ends as the others do
                os._exit(HUNG)
            dead = self._dead()  # what gloo says of a lost connection names no rank
            if dead:
                _, step, phase = self._now
                raise RankError(
                    f"another process is gone, noticed in step {step}, phase {phase}; last heard of "
                    f"{'; '.join(map(str, dead))}; {_GO_ON}"
                ) from error

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            # Counted by ticks: a job that was suspended as a whole and goes on is not late.
            self._waited += min(now - last, 2 * self._interval)
            last = now
            self._note()
            said = self._said()
            self._called = self._called + 1 if said == "" else 0
            if said or self._called > _INTERVALS_OF_ROLL_CALL:
                os._exit(HUNG)
            if said is None and self._waited > self._deadline():
                self._call_roll()
        self._note()  # how far it has come

    def _note(self) -> None:
        if self._now != self._seen:
            self._seen, self._waited = self._now, 0.0
        self._write()

    def _deadline(self) -> float:
        phase = self._seen[2]
        section = self._section
        return section.deadlines.get(phase, max(section.deadline, LONG_PHASES.get(phase, 0.0)))

    def _said(self) -> str | None:
        """What was found when the roll was called; empty until it is known, None where it was not called."""
        path = self._folder / HANG
        try:
            return path.read_text(encoding="utf-8") if path.stat().st_mtime >= self._begun else None
        except OSError:
            return None

    def _write(self) -> None:
        beats, step, phase = self._seen
        self._written += 1
        beat = replace(
            self._me,
            step=step,
            phase=phase,
            beats=beats,
            seconds=round(self._waited, 1),
            written=self._written,
            stack=self._stack() if self._called or self._waited > self._deadline() / 2 else (),
        )
        record = json.dumps(asdict(beat)).encode().ljust(_RECORD)
        with contextlib.suppress(OSError):  # a full disk is for the main thread to report
            file = os.open(_path(self._folder, beat.rank), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(file, record, 0)
            finally:
                os.close(file)

    def _stack(self) -> tuple[str, ...]:
        frame = sys._current_frames().get(self._main)
        frames = traceback.extract_stack(frame)[-_FRAMES:]
        return tuple(f"{entry.filename}:{entry.lineno} {entry.name}: {entry.line}"[:300] for entry in frames)

    def _call_roll(self) -> None:
        """Find the rank that the others wait for, say so, end."""
        try:
            (self._folder / HANG).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # without the file each rank says it by itself
        self._called = 1
        before = read(self._folder, self._ranks)
        self._observe()
        if self._now != self._seen:  # late, but it goes on
            (self._folder / HANG).unlink(missing_ok=True)
            return
        beats = read(self._folder, self._ranks)
        silent = [n for n in range(self._ranks) if n not in beats or before.get(n) == beats[n]]
        text = self._text(beats, silent)
        print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            (self._folder / HANG).write_text(text + "\n", encoding="utf-8")
        for rank in silent:
            if rank in beats and (process := _process(beats[rank])):
                process.kill()  # stopped or stuck, it would hold up a launcher that asks it to end
        os._exit(HUNG)

    def _observe(self) -> None:
        """Long enough for all that run to write twice, this rank too."""
        for _ in range(2):
            time.sleep(max(2.0, self._interval * _INTERVALS_OF_SILENCE) / 2)
            self._write()

    def _text(self, beats: dict[int, Beat], silent: list[int]) -> str:
        deadline, phase = self._deadline(), self._seen[2] or "between phases"
        lines = [f"{self._name}: rank {self._me.rank} has waited longer than the {deadline:g} s of phase {phase}"]
        for rank in silent:
            if rank not in beats:
                lines.append(f"  not answering: rank {rank}, which was never heard of")
                continue
            lines.append(f"  not answering: {beats[rank]}; {_state(beats[rank])}")
            lines += [f"    {line}" for line in self._stack_of(beats[rank])]
        behind = [] if silent else _behind(beats)
        for rank in behind:
            lines.append(f"  holding up the others: {beats[rank]}")
            lines += [f"    {frame}" for frame in beats[rank].stack]
        rest = [beat for rank, beat in sorted(beats.items()) if rank not in {*silent, *behind}]
        lines += [f"  waiting: {beat}" for beat in rest[:8]]
        if len(rest) > 8:
            lines.append(f"  waiting: {counted(len(rest) - 8, 'more rank')}")
        return "\n".join([*lines, f"  {_GO_ON}; deadlines are set in [guard]"])

    def _stack_of(self, beat: Beat) -> list[str]:
        """Where a process of this host is that runs, though its interpreter does not."""
        process = _process(beat)
        if not process or process.status() == psutil.STATUS_STOPPED:
            return []
        process.send_signal(signal.SIGUSR2)
        time.sleep(_SECONDS_TO_DUMP)
        with contextlib.suppress(OSError):
            return _path(self._folder, beat.rank).with_suffix(".stack").read_text().splitlines()
        return []

    def _dead(self) -> list[Beat]:
        """Ranks on this host that are no more. Sockets close a little before a process is gone."""
        for _ in range(20):
            beats = read(self._folder, self._ranks)
            here = [beat for beat in beats.values() if beat.host == self._me.host]
            dead = [beat for beat in here if not _process(beat)]
            if dead:
                return dead
            time.sleep(0.1)
        return []


_GO_ON = "the same command goes on from the last checkpoint"


def read(folder: Path, ranks: int) -> dict[int, Beat]:
    """The last beat of each rank that has left one."""
    beats = {}
    for rank in range(ranks):
        for _ in range(3):  # it may be in the middle of being written
            try:
                entry = json.loads(_path(folder, rank).read_text(encoding="utf-8"))
            except FileNotFoundError:
                break
            except ValueError:
                time.sleep(0.01)
                continue
            beats[rank] = Beat(**entry | {"stack": tuple(entry["stack"])})
            break
    return beats


def missing(output: Path) -> list[Path]:
    """The folders that a run in `output` will make, innermost first."""
    folder = output / FOLDER
    return list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))


def leave_nothing(output: Path, ranks: int, made: list[Path]) -> None:
    """Remove the files of a run that was refused, unless a phase of it has begun. `made`: see `missing`.

    Not by the ranks themselves where there are several: others may only just be coming here, or ask who is gone.
    """
    if any(beat.beats for beat in read(output / FOLDER, ranks).values()):
        return
    for path in (_path(output / FOLDER, rank) for rank in range(ranks)):
        path.unlink(missing_ok=True)
        path.with_suffix(".stack").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is something else in it
        for path in made:
            path.rmdir()


def last_words(output: Path | None, rank: int) -> str:
    """What is known of a rank that is no more."""
    beats = read(output / FOLDER, rank + 1) if output else {}
    return str(beats.get(rank, f"rank {rank}"))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def _behind(beats: dict[int, Beat]) -> list[int]:
    """Of ranks that all run, those that the others wait for."""
    step = min(beat.step for beat in beats.values())
    last = {rank: beat for rank, beat in beats.items() if beat.step == step}
    busy = [rank for rank, beat in last.items() if not beat.waits]
    if 0 < len(busy) < len(beats):
        return busy
    fewest = min(beat.beats for beat in last.values())
    return [rank for rank, beat in last.items() if beat.beats == fewest]


def _process(beat: Beat) -> psutil.Process | None:
    """The process of a rank, if it is of this host and not gone."""
    try:
        process = psutil.Process(beat.pid)
        same = beat.host == socket.gethostname() and abs(process.create_time() - beat.created) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _state(beat: Beat) -> str:
    """What this host knows of a silent rank."""
    if beat.host != socket.gethostname():
        return "its host or the way to it may be down"
    process = _process(beat)
    if not process:
        return "the process is gone"
    stopped = process.status() == psutil.STATUS_STOPPED
    return "the process is stopped (SIGSTOP)" if stopped else "the process is there, but its interpreter is stuck"
