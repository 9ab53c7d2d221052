"""Breaks the engine of a run at random moments: `python -m tests.chaos.engine_faults --faults=50 --seed=7`.

One `megatron-r1 rl` with a real engine, of which by turns a process is killed (SIGKILL), an answer is made wrong, and a
process is stopped (SIGSTOP); the next fault comes when the engine is back. The run has to end by itself with every step
done once and every question trained on once; with `--dispatch=batch` bit for bit as an undisturbed one.
"""

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.chaos.faulty_engine import ANSWERS, FOLDER_VARIABLE
from tests.chaos.kills import PATIENCE, FailedError, differences
from tests.end_to_end import runs
from tests.end_to_end.runs import Command
from tests.processes import command_line

LOST, BACK = " is taken out", " is back, "
"""What the run says of its engine."""
KILLED = ("server killed", "core killed", "supervisor killed")
STOPPED = ("core stopped", "server stopped")
STEPS = 4
"""For each fault: the learner goes on until it is noticed, and a little longer with groups that are complete."""
LONGEST_PAUSE = 1.5
"""Seconds from the engine's return to the next fault, in which it samples."""


@dataclass(frozen=True)
class Fault:
    """One disturbance."""

    kind: str
    pause: float
    """Seconds after the engine has come back."""


def draw(count: int, chance: random.Random) -> list[Fault]:
    """A killed process, a wrong answer, a stopped process, and so on; of each sort all kinds before one comes again."""
    sorts = [chance.sample(kinds, len(kinds)) for kinds in (KILLED, ANSWERS, STOPPED)]
    kinds = [sorts[n % 3][n // 3 % len(sorts[n % 3])] for n in range(count)]
    return [Fault(kind, chance.uniform(0, LONGEST_PAUSE)) for kind in kinds]


@dataclass
class Run:
    """A run of the command with its engine, and what is done to it."""

    folder: Path
    tree: dict[str, Any]
    """Its run file, but for `output`."""

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def hold(self) -> Path:
        """While it exists the learner waits, so that no step passes between two faults."""
        return Path(self.tree["loss"]["file"])

    @property
    def port(self) -> int:
        port: int = self.tree["rollout"]["port"]
        return port

    def undisturbed(self) -> Path:
        """The output folder of the same run without faults."""
        whole = self.folder / "whole"
        with self._start(whole) as command:
            self._end(command)
        return whole

    def suffer(self, faults: list[Fault], say: Callable[[str], None]) -> None:
        """One run from nothing to its end, with all faults."""
        self.hold.touch()
        with self._start(self.output) as command:
            command.until(lambda: "evaluation after 0 steps" in command.message(), PATIENCE)
            for number, fault in enumerate(faults, start=1):
                time.sleep(fault.pause)
                lost, began = command.message().count(LOST), time.monotonic()
                self._break(command, fault.kind)
                self.hold.unlink()
                command.until(lambda lost=lost: command.message().count(LOST) > lost, PATIENCE)  # type: ignore[misc]
                noticed = time.monotonic() - began
                self.hold.touch()
                command.until(lambda: command.message().count(BACK) == command.message().count(LOST), PATIENCE)
                steps, back = command.message().count("\nstep "), time.monotonic() - began
                say(f"{number}: {fault.kind} after {steps} steps, noticed in {noticed:.1f} s, back in {back:.1f} s")
            self.hold.unlink()
            self._end(command)

    def check(self, faults: int) -> dict[str, float]:
        """What the run has done, as the fleet counts it.

        Raises:
            FailedError: it is not what it should be.
        """
        tree, steps = self.tree, self.tree["steps"]
        found = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in found if row["kind"] == "step"]
        counts = {name: rows[-1][f"fleet_{name}"] for name in ("engines_lost", "engines_returned", "samples_again")}
        checks = {
            "steps done once": [row["step"] for row in rows] == list(range(steps)),
            "questions drawn": runs.summary(self.output)["questions_drawn"] == steps * tree["questions"],
            "faults noticed": counts["engines_lost"] == counts["engines_returned"] >= faults,
        }
        if tree["rollout"]["dispatch"] == "continuous":
            kept = torch.load(self.output / f"checkpoints/step_{steps:08d}/common.pt", weights_only=True)
            ledger = kept["figures"]["in_flight"]["ledger"]
            trained = sum(count for _, count in ledger["staleness"])
            checks["trained on once"] = trained == steps * tree["questions"] and not ledger["live"]
        if wrong := [what for what, right in checks.items() if not right]:
            raise FailedError(f"{self.output}: {', '.join(wrong)}: {counts}, {rows[-1]}")
        return counts

    def _break(self, command: Command, kind: str) -> None:
        if kind in ANSWERS:
            whole = self.folder / f"{self.port}.fault-aside"
            whole.write_text(kind)
            whole.replace(whole.with_suffix(".fault"))  # it is read as soon as it is there
            return
        whom, how = kind.split()
        with_port = [one for one in command.look() if f"--port={self.port}" in command_line(one)]
        supervisor = next(one for one in with_port if "megatron_r1.rollout.supervisor" in command_line(one))
        server = next(one for one in with_port if one != supervisor)
        core = next(one for one in server.children(recursive=True) if "EngineCore" in " ".join(command_line(one)))
        victim: psutil.Process = {"supervisor": supervisor, "server": server, "core": core}[whom]
        victim.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    def _start(self, output: Path) -> Command:
        os.environ[FOLDER_VARIABLE] = str(self.folder)
        return Command("rl", runs.write(output.with_suffix(".toml"), self.tree | {"output": str(output)}))

    @staticmethod
    def _end(command: Command) -> None:
        if command.end(PATIENCE):
            raise FailedError(f"the run has failed: {command.message()}")


def run_file(prepared: Path, folder: Path, faults: int, dispatch: str) -> dict[str, Any]:
    """Enough steps, an engine that may be lost as often as it likes; with "continuous" also ahead of the learner."""
    tree = runs.rl(prepared, folder / "unused", runs.free_port())
    tree["rollout"] |= {
        "dispatch": dispatch,
        "start_timeout": PATIENCE,
        "stall_timeout": 15.0,
        "max_restarts": 1000,
        "arguments": ["--middleware=tests.chaos.faulty_engine.FaultyEngine"],
    }
    if dispatch == "continuous":
        tree["rollout"] |= {"max_staleness": 1, "weights_change": "partial_rollouts"}
    steps = STEPS * faults + 1
    loss = {"type": "tests.end_to_end.components:Held", "file": str(folder / "hold")}
    return tree | {"steps": steps, "loss": loss, "checkpoint": {"every": max(steps // 4, 1)}}


def main() -> None:
    """Break, check, and print what was done as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.engine_faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--dispatch", choices=("continuous", "batch"), default="continuous")
    parser.add_argument("--prepared", type=Path, help="folder of `tests.end_to_end.runs.prepare`; made if not given")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the run, too
    folder, began = Path(tempfile.mkdtemp(prefix="engine_faults_")), time.monotonic()
    if not options.prepared:
        runs.prepare(folder)
    run = Run(folder, run_file(options.prepared or folder, folder, options.faults, options.dispatch))
    faults = draw(options.faults, random.Random(options.seed))
    try:
        whole = run.undisturbed() if options.dispatch == "batch" else None
        run.suffer(faults, lambda text: print(text, file=sys.stderr, flush=True))
        counts = run.check(len(faults))
        if whole and (unequal := differences(run.output, whole)):
            raise FailedError(f"differs from the undisturbed run: {', '.join(unequal)}")
    except (FailedError, AssertionError) as error:
        sys.exit(f"--seed={options.seed}, files in {folder}: {error}")
    shutil.rmtree(folder)
    by_kind = Counter(fault.kind for fault in faults)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"seed": options.seed, "faults": len(faults), "by_kind": by_kind, **counts, "seconds": seconds}))


if __name__ == "__main__":
    main()
