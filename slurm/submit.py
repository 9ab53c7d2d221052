#!/usr/bin/env python3
"""Submit a run, or a whole recipe as a chain of jobs, with as many nodes as its run files ask for.

    python slurm/submit.py rl run.toml [--section.key=value ...] -- --partition=gpu --time=24:00:00
    python slurm/submit.py rl run.toml --fleet=job -- --partition=gpu --time=24:00:00
    python slurm/submit.py recipe.toml [--stages.r1_zero.steps=10] -- --partition=gpu --time=24:00:00

What follows `--` are options of sbatch, for every job. Of a recipe the stages that are done and unchanged are left out;
each other one waits for the one before, and is given up with it. The numbers of the jobs go to standard output.
"""

import argparse
import contextlib
import io
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.cli import main as megatron_r1
from megatron_r1.cluster.needs import Needs, check_elsewhere, needs
from megatron_r1.errors import ConfigError, UserError

HERE = Path(__file__).resolve().parent
SCRIPTS = {"pretrain", "sft", "rl", "collect", "evaluate"}
"""Verbs with a script of their own name; convert.sbatch takes any."""


@dataclass(frozen=True)
class Placement:
    """What is the same for all jobs."""

    gpus: int
    """Of a node."""
    fleet: str
    """Where the engines of `rl` are: `part` of its job, another `job`, or `local`, beside the trainer."""
    options: Sequence[str]
    """Of sbatch."""

    def part(self, nodes: int) -> list[str]:
        """Options of a job, or of a part of one."""
        gpus = [f"--gpus-per-node={self.gpus}"] if self.gpus else []
        return [f"--nodes={nodes}", *gpus, "--exclusive", "--mem=0", "--requeue", *self.options]


def said(arguments: Sequence[str]) -> str:
    """What `megatron-r1 <arguments>` prints; where it fails, it has said why, and this ends, too."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = megatron_r1(list(arguments))
    if code:
        sys.exit(code)
    return output.getvalue()


def needed(resolved: str, place: Placement) -> Needs:
    """What a resolved run file asks for.

    Raises:
        ConfigError: nodes cannot serve it, or not with its engines where they will be.
    """
    run = tomllib.loads(resolved)
    wanted = needs(run, place.gpus)
    if (place.fleet != "local") if wanted.trains else (len(wanted.fleet) > 1):
        try:
            check_elsewhere(run)
        except ConfigError as error:
            if not wanted.trains:
                raise
            raise ConfigError(f"{error}; or submit it with --fleet=local: engines beside the trainer") from error
    return wanted


def command(wanted: Needs, place: Placement, name: str, script: str, arguments: Sequence[str]) -> list[str]:
    """The sbatch command of one job."""
    own = [f"--job-name={name}", "--parsable"]
    fleet = len(wanted.fleet)
    if not wanted.trains:
        parts = place.part(max(fleet, 1))
    elif fleet and place.fleet == "part":
        parts = [*place.part(wanted.nodes), ":", *place.part(fleet)]
    else:
        parts = place.part(wanted.nodes)
    return ["sbatch", *own, *parts, str(HERE / script), *arguments]


def submit(line: list[str], dry_run: bool) -> str:
    """Submit a job, say how, and return its number."""
    print(shlex.join(line), file=sys.stderr)
    if dry_run:
        return "JOB"
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip().partition(";")[0]


def single(verb: str, arguments: list[str], place: Placement, dry_run: bool) -> list[str]:
    """The job of one run file, or its two."""
    wanted = needed(said([*verb.split(), *arguments, "--dry-run"]), place)
    if verb == "rl" and place.fleet == "job" and wanted.fleet:
        engines = Needs(wanted.output, False, 1, 1, wanted.fleet)
        lines = [
            command(engines, place, "rl_fleet", "rl_fleet.sbatch", arguments),
            command(wanted, place, "rl_learner", "rl_learner.sbatch", arguments),
        ]
        return [submit(line, dry_run) for line in lines]
    if verb in SCRIPTS:
        line = command(wanted, place, verb, f"{verb}.sbatch", arguments)
    else:
        line = command(wanted, place, verb.replace(" ", "_"), "convert.sbatch", [*verb.split(), *arguments])
    return [submit(line, dry_run)]


def recipe(file: str, overrides: list[str], place: Placement, dry_run: bool) -> list[str]:
    """The jobs of a recipe, each after the one before."""
    graph: dict[str, Any] = json.loads(said(["run", file, *overrides, "--dry-run", "--json"]))
    if missing := "\n".join(graph["missing"]):
        if not dry_run:
            sys.exit(missing)
        print(missing, file=sys.stderr)
    left = [stage["stage"] for stage in graph["stages"] if stage["state"] != "done"]
    stages = {name: needed(said(["run", file, *overrides, "--stage", name]), place) for name in left}
    jobs: list[str] = []
    for name, wanted in stages.items():
        line = command(wanted, place, name, "stage.sbatch", [file, name, *overrides])
        if jobs:
            line[1:1] = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"]
        jobs.append(submit(line, dry_run))
    if not left:
        print("all stages are done", file=sys.stderr)
    return jobs


def main() -> None:
    """See above."""
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    words, options = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="a verb and its run file, or a recipe")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0 on nodes without any (default: 8)")
    parser.add_argument(
        "--fleet", choices=["part", "job", "local"], default="part", help="where the engines of rl are (default: part)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and submit nothing")
    known, overrides = parser.parse_known_args(words)
    place = Placement(known.gpus_per_node, known.fleet, options)
    *verb, file = known.what
    try:
        if not verb and known.fleet == "job":
            parser.error("--fleet=job is for a single run: a stage of a recipe is one job")
        if verb:
            jobs = single(" ".join(verb), [file, *overrides], place, known.dry_run)
        else:
            jobs = recipe(file, overrides, place, known.dry_run)
    except UserError as error:
        sys.exit(f"submit.py: {error}")
    print("\n".join(jobs))


if __name__ == "__main__":
    main()
