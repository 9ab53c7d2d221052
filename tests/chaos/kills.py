"""Kills processes of runs at random moments: `python -m tests.chaos.kills --runs=100 --seed=7`.

A command is started, one of its processes is killed by SIGKILL, the same command is started again, and so on until it
has done its work. This must then be what an undisturbed one does, bit for bit, and no process may be left. Half of the
kills hit pretraining, half reinforcement learning, or all what `--verb` names; both run in two processes. Victims and
moments follow from the seed, which every failure names.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.chaos import warm
from tests.chaos.victims import DEADLY, POLL_SECONDS, VICTIMS, Kill, Seconds, Watch, draw
from tests.end_to_end import runs
from tests.processes import command_line

PATIENCE = 900
"""Seconds that a command may take to its end, on machines that are busy with others."""
_LEFT_SECONDS = 30
"""Seconds after which a process that a command has left is an orphan: vLLM's may take five to remove their memory."""
_PR_SET_CHILD_SUBREAPER = 36


class FailedError(Exception):
    """A run did not end as it should."""


@dataclass
class Hit:
    """A kill that has found its victim."""

    kill: Kill
    life: int
    """Number of the run."""
    steps: int
    """That the run had done."""
    ended: int | None = None
    """Exit code of the command; None where it went on without the victim."""

    def __str__(self) -> str:
        after = "went on" if self.ended is None else f"exit code {self.ended}"
        return f"run {self.life}, step {self.steps}: {self.kill}: {after}"


@dataclass
class Lives:
    """Runs of one verb, and what was done to them."""

    verb: str
    folder: Path
    tree: dict[str, Any]
    """Their run file, but for `output`."""
    say: Callable[[object], None]
    hits: list[Hit] = field(default_factory=list)
    count: int = 0

    @property
    def whole(self) -> Path:
        """The output folder of the undisturbed run."""
        return self.folder / "whole"

    @property
    def steps(self) -> int:
        return self.tree["steps"]

    def undisturbed(self) -> None:
        """The run that all others are compared with; how long its moments last."""
        command, began = self._start(self.whole)
        watch, first = Watch(command, self.whole, self.steps), dict[str, float]()
        marks = watch.happened | {"kept": runs.checkpoint(self.whole, self.tree["checkpoint"]["every"])}
        while command.process.poll() is None:
            for name, happened in marks.items():
                if name not in first and happened():
                    first[name] = time.monotonic()
            time.sleep(POLL_SECONDS)
        ended = time.monotonic()
        if self._end(command) or [row["step"] for row in runs.rows(self.whole)] != list(range(self.steps)):
            raise FailedError(f"the undisturbed run failed: {command.message()}")
        self.seconds = Seconds(
            start=first["step"] - began,
            step=(first["end"] - first["step"]) / (self.steps - 1),
            checkpoint=first["kept"] - first["checkpoint"],
            end=ended - first["end"],
        )
        self.say(f"{self.verb}: undisturbed {ended - began:.1f} s; {self.seconds}")

    def suffer(self, kills: list[Kill]) -> None:
        """Runs from nothing to their ends, until all kills have hit."""
        pending = list(kills)
        while pending:
            output = self.folder / f"run_{self.count}"
            while self._killed(output, pending):
                pass
            unequal = differences(output, self.whole)
            if unequal:
                raise FailedError(f"{output} differs from {self.whole}: {'; '.join(unequal)}")
            self.say(f"{self.verb}: run {self.count} ended as the undisturbed one")
            if pending:  # its moment was shorter this time
                pending[0] = replace(pending[0], share=pending[0].share / 2)
            shutil.rmtree(output)
            self.count += 1

    def _killed(self, output: Path, pending: list[Kill]) -> bool:
        """Start the command and kill what is next; whether it must be started again."""
        hits, (command, _) = list[Hit](), self._start(output)
        watch = Watch(command, output, self.steps)
        while pending and (process := watch.victim(pending[0], self.seconds)):
            done = watch.steps()
            process.kill()
            hits.append(Hit(pending.pop(0), self.count, len(runs.rows(output)) if done else 0))
            deadly = hits[-1].kill.victim in DEADLY
            if not watch.until(lambda: not deadly and watch.steps() > done):  # noqa: B023 (awaited here)
                break
        code = self._end(command)
        if code and not hits:
            raise FailedError(f"the command ended with {code} by itself: {command.message()}")
        if code:
            hits[-1].ended = code
        elif hits and hits[-1].kill.victim in DEADLY:  # it had just ended by itself
            pending.insert(0, hits.pop().kill)
        for hit in hits:
            self.say(hit)
        self.hits += hits
        return code != 0

    def _start(self, output: Path) -> tuple[warm.WarmCommand, float]:
        run_file = runs.write(output.with_suffix(".toml"), self.tree | {"output": str(output)})
        return warm.WarmCommand(self.verb, run_file), time.monotonic()

    def _end(self, command: warm.WarmCommand) -> int:
        """Its exit code, when all its processes have gone."""
        code = command.end(PATIENCE)
        deadline = time.monotonic() + _LEFT_SECONDS
        while left := _descendants():
            if time.monotonic() > deadline:
                raise FailedError(f"left behind: {[' '.join(command_line(process)) for process in left]}")
            time.sleep(0.05)
        port = self.tree.get("rollout", {}).get("port")
        if port and not runs.is_free(port):
            raise FailedError(f"port {port} is still held")
        return code


def differences(output: Path, whole: Path) -> list[str]:
    """What a run has done otherwise than the undisturbed one: each step, evaluation and sample once, the same."""
    compared: dict[str, Callable[[Path], Any]] = {
        "weights": runs.weights,
        "steps": runs.rows,
        "evaluations": lambda folder: runs.rows(folder, "evaluation"),
        "figures": runs.summary,
        "samples": lambda folder: (folder / "samples.jsonl").read_bytes(),
        "checkpoints": lambda folder: sorted(path.name for path in folder.glob("checkpoints/step_*[0-9]")),
    }
    return [name for name, read in compared.items() if read(output) != read(whole)]


def _descendants() -> list[psutil.Process]:
    """All processes below this one, which orphans are handed to; those that have ended are forgotten."""
    left = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return left


def trees(prepared: Path) -> dict[str, dict[str, Any]]:
    """Verb -> its run file. Checkpoints are many, and in pretraining written while training goes on."""
    pretraining = runs.pretrain(prepared, prepared / "unused")
    port = runs.free_port()
    learning = runs.rl(prepared, prepared / "unused", port)
    learning["rollout"] |= {"start_timeout": PATIENCE}
    return {
        "pretrain": pretraining | {"steps": 8, "checkpoint": {"every": 2, "asynchronous": True}},
        "rl": learning,
    }


def main() -> None:
    """Kill, compare, and print what was done as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--verb", choices=VICTIMS, help="only this one")
    parser.add_argument("--prepared", type=Path, help="folder of `tests.end_to_end.runs.prepare`; made if not given")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    folder, began = Path(tempfile.mkdtemp(prefix="chaos_")), time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without a thread of its own: commands are forked from this process.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(f"kills, seed {options.seed}", total=options.runs)

        def say(what: object) -> None:
            progress.console.print(str(what), highlight=False, markup=False, soft_wrap=True)
            progress.update(task, advance=isinstance(what, Hit), refresh=True)

        warm.load()
        if not options.prepared:
            runs.prepare(folder)
        files = trees(options.prepared or folder)
        verbs = [options.verb] if options.verb else list(VICTIMS)
        lives = [Lives(verb, folder / verb, files[verb], say) for verb in verbs]
        try:
            for number, one in enumerate(lives):
                one.undisturbed()
                share = options.runs // len(lives) + (number < options.runs % len(lives))
                one.suffer(draw(one.verb, share, random.Random(f"{options.seed} {one.verb}")))
        except Exception as error:
            history = "\n".join(str(hit) for one in lives for hit in one.hits)
            sys.exit(f"--seed={options.seed}, files in {folder}: {error}\nkills so far:\n{history}")
        finally:
            for process in _descendants():
                process.kill()
    shutil.rmtree(folder)
    print(json.dumps(summary(options.seed, lives, time.monotonic() - began)))


def summary(seed: int, lives: list[Lives], seconds: float) -> dict[str, Any]:
    """What was done, in figures."""
    hits = [hit for one in lives for hit in one.hits]
    return {
        "seed": seed,
        "kills": len(hits),
        "finished_runs": sum(one.count for one in lives),
        "by_victim": Counter(f"{hit.kill.verb}: {hit.kill.victim}" for hit in hits),
        "by_moment": Counter(hit.kill.moment for hit in hits),
        "went_on": sum(hit.ended is None for hit in hits),
        "undisturbed_seconds": {one.verb: asdict(one.seconds) for one in lives},
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
