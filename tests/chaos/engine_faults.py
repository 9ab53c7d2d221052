"""Breaks the engine of a run at random moments: `python -m tests.chaos.engine_faults --faults=50 --seed=7`.

One `megatron-r1 rl` with a real engine, of which by turns a process is killed (SIGKILL), an answer is made wrong, and a
process is stopped (SIGSTOP); the next fault comes when the engine is back. The run has to end by itself with every step
done once and every question trained on once; with `--dispatch=batch` bit for bit as an undisturbed one.

With `--seeds=3` it is the work of the quickstart, and begins from its base model (`make quickstart`). The same is then
done undisturbed with so many other seeds, and the disturbed run has to end as accurate as these (`seed_noise.py`).
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
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.chaos import seed_noise
from tests.chaos.faulty_engine import ANSWERS, FOLDER_VARIABLE
from tests.chaos.kills import PATIENCE, FailedError, differences
from tests.end_to_end import runs
from tests.end_to_end.runs import Command
from tests.processes import command_line

SEED = 0
"""Of the disturbed run."""
STEP = "\nstep "
LOST, BACK = " is taken out", " is back, "
"""What the run says of a step that is done, and of its engine."""
KILLED = ("server killed", "core killed", "supervisor killed")
STOPPED = ("core stopped", "server stopped")
STEPS = 4
"""Of each fault: in the first two it comes, in the other two at the latest it is noticed, as they need new samples."""
LONGEST_PAUSE = 1.5
"""Seconds from the beginning of these steps to the fault."""
QUICKSTART = runs.ROOT / "examples/r1_tiny/r1_zero.toml"


@dataclass(frozen=True)
class Fault:
    """One disturbance."""

    kind: str
    pause: float
    """Seconds that the steps in which it comes are under way."""


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
        return self.folder / "disturbed/run"

    @property
    def port(self) -> int:
        port: int = self.tree["rollout"]["port"]
        return port

    def undisturbed(self, seed: int) -> Path:
        """The output folder of the same run without faults, of this seed."""
        whole = self.folder / f"undisturbed_{seed}/run"
        with self._start(whole, seed) as command:
            self._end(command)
        self.check(whole, faults=0)
        return whole

    def suffer(self, faults: list[Fault], say: Callable[[str], None]) -> None:
        """One run from nothing to its end, with all faults spread over it."""
        self._may_do(0)
        with self._start(self.output, SEED) as command:
            command.until(lambda: "evaluation after 0 steps" in command.message(), PATIENCE)
            for number, fault in enumerate(faults):
                before = number * STEPS
                command.until(lambda before=before: command.message().count(STEP) >= before, PATIENCE)  # type: ignore[misc]
                self._may_do(before + STEPS // 2)
                time.sleep(fault.pause)
                lost, began = command.message().count(LOST), time.monotonic()
                self._break(command, fault.kind)
                self._may_do(before + STEPS)
                command.until(lambda lost=lost: command.message().count(LOST) > lost, PATIENCE)  # type: ignore[misc]
                noticed = time.monotonic() - began
                command.until(lambda: command.message().count(BACK) == command.message().count(LOST), PATIENCE)
                steps, back = command.message().count(STEP), time.monotonic() - began
                say(f"{number + 1}: {fault.kind}, noticed in {noticed:.1f} s, back in {back:.1f} s, {steps} steps")
            self._may_do(self.tree["steps"])
            self._end(command)

    def check(self, output: Path, faults: int) -> dict[str, float]:
        """What a run has done: the samples that its updates were made of, and its engine's losses.

        Raises:
            FailedError: it is not what it should be.
        """
        tree, steps = self.tree, self.tree["steps"]
        found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in found if row["kind"] == "step"]
        counts = {name: rows[-1][f"fleet_{name}"] for name in ("engines_lost", "engines_returned", "samples_again")}
        counts["samples"] = sum(int(line) for line in _counted(output).read_text().splitlines())
        checks = {
            "steps done once": [row["step"] for row in rows] == list(range(steps)),
            "questions drawn": runs.summary(output)["questions_drawn"] == steps * tree["questions"],
            "samples in updates": counts["samples"] == steps * tree["questions"] * tree["group_size"],
            "faults noticed": counts["engines_lost"] == counts["engines_returned"] >= faults,
        }
        if tree["rollout"]["dispatch"] == "continuous":
            kept = torch.load(output / f"checkpoints/step_{steps:08d}/common.pt", weights_only=True)
            ledger = kept["figures"]["in_flight"]["ledger"]
            trained = sum(count for _, count in ledger["staleness"])
            checks["trained on once"] = trained == steps * tree["questions"] and not ledger["live"]
        if wrong := [what for what, right in checks.items() if not right]:
            raise FailedError(f"{output}: {', '.join(wrong)}: {counts}, {rows[-1]}")
        return counts

    def _may_do(self, steps: int) -> None:
        """The learner waits when it has done so many."""
        file = Path(self.tree["loss"]["file"])
        aside = file.with_suffix(".aside")
        aside.write_text(str(steps * self.tree["minibatches"]))
        aside.replace(file)  # it is read at any time

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

    def _start(self, output: Path, seed: int) -> Command:
        os.environ[FOLDER_VARIABLE] = str(self.folder)
        loss = self.tree["loss"] | {"counted": str(_counted(output))}
        tree = self.tree | {"output": str(output), "seed": seed, "loss": loss}
        return Command("rl", runs.write(output.with_suffix(".toml"), tree))

    @staticmethod
    def _end(command: Command) -> None:
        if command.end(PATIENCE):
            raise FailedError(f"the run has failed: {command.message()}")


def _counted(output: Path) -> Path:
    """What the loss of a run has written down."""
    return output.with_suffix(".counted")


def quickstart(output: Path, port: int) -> dict[str, Any]:
    """The quickstart's run in smaller steps, as faults need many, and with a learning rate that falls to 0: at a
    constant one accuracy goes up and down from step to step, and this noise would hide what faults do.

    Raises:
        FailedError: there is no base model to begin from.
    """
    tree = tomllib.loads(QUICKSTART.read_text())
    if not (runs.ROOT / tree["model"]["path"]).exists():
        raise FailedError(f"{tree['model']['path']} is not there: `make quickstart` makes it")
    smaller = {"questions": 8, "group_size": 8, "minibatches": 2, "reference": {"refresh_every": 50}}
    tree["rollout"]["port"] = port
    tree["evaluation"]["every"] = 50
    tree["optim"]["schedule"] = "cosine"
    return tree | smaller | {"output": str(output), "report": runs.QUIET}


def run_file(tree: dict[str, Any], folder: Path, faults: int, dispatch: str) -> dict[str, Any]:
    """`tree` with enough steps, an engine that may be lost as often as it likes; "continuous" ahead of the learner."""
    rollout = tree["rollout"] | {
        "dispatch": dispatch,
        "start_timeout": PATIENCE,
        "stall_timeout": 15.0,
        "max_restarts": 1000,
        "arguments": ["--middleware=tests.chaos.faulty_engine.FaultyEngine"],
    }
    if dispatch == "continuous":
        rollout |= {"max_staleness": 1, "weights_change": "partial_rollouts"}
    steps = STEPS * faults + 1
    loss = {"type": "tests.end_to_end.components:Held", "file": str(folder / "hold")}
    every = max(steps // 4, 1)
    return tree | {"steps": steps, "rollout": rollout, "loss": loss, "checkpoint": {"every": every}}


def compared(run: Run, dispatch: str, seeds: int) -> dict[str, Any]:
    """What undisturbed runs have to say of a disturbed one.

    Raises:
        FailedError: it is not what they are.
    """
    if dispatch == "batch" and (unequal := differences(run.output, run.undisturbed(SEED))):
        raise FailedError(f"differs from the undisturbed run: {', '.join(unequal)}")
    if not seeds:
        return {}
    others = [run.undisturbed(SEED + number) for number in range(1, seeds + 1)]
    answers = run.tree["evaluation"]["questions"] * run.tree["evaluation"]["samples"]
    accuracies = seed_noise.read(run.output, others, answers)
    if wrong := accuracies.wrong():
        raise FailedError(f"{'; '.join(wrong)}: {accuracies}")
    return {"heldout_accuracy": asdict(accuracies) | {"expected": accuracies.expected}}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.engine_faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the faults")
    parser.add_argument("--dispatch", choices=("continuous", "batch"), default="continuous")
    parser.add_argument("--seeds", type=int, default=0, help="undisturbed runs to compare the accuracy with")
    parser.add_argument("--prepared", type=Path, help="folder of `tests.end_to_end.runs.prepare`; made if not given")
    options = parser.parse_args()
    if options.seeds == 1:
        parser.error("--seeds=1: one seed has no noise; 0, or 2 and more")
    return options


def main() -> None:
    """Break, check, and print what was done as JSON."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the run, too
    folder, began = Path(tempfile.mkdtemp(prefix="engine_faults_")), time.monotonic()
    faults = draw(options.faults, random.Random(options.seed))
    try:
        if options.seeds:
            tree = quickstart(folder / "unused", runs.free_port())
        else:
            if not options.prepared:
                runs.prepare(folder)
            tree = runs.rl(options.prepared or folder, folder / "unused", runs.free_port())
        run = Run(folder, run_file(tree, folder, options.faults, options.dispatch))
        run.suffer(faults, lambda text: print(text, file=sys.stderr, flush=True))
        counts = run.check(run.output, len(faults))
        accuracies = compared(run, options.dispatch, options.seeds)
    except (FailedError, AssertionError) as error:
        sys.exit(f"--seed={options.seed}, files in {folder}: {error}")
    shutil.rmtree(folder)
    by_kind = Counter(fault.kind for fault in faults)
    done = {"seed": options.seed, "faults": len(faults), "by_kind": by_kind, "steps": run.tree["steps"], **counts}
    print(json.dumps(done | accuracies | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
