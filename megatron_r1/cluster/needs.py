"""What a run file asks of a cluster, as assignments for a shell; the resolved file comes on standard input.

    megatron-r1 rl run.toml --dry-run | python -m megatron_r1.cluster.needs --gpus-per-node=8

The run file alone says how many nodes there have to be: [parallel] those of the trainer, `engines` and their arguments
those of the rollout fleet.
"""

import argparse
import math
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.engine_arguments import ranks
from megatron_r1.config.evaluation import NucleusSection
from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError, UserError


@dataclass(frozen=True)
class Engine:
    """One vLLM server that a run file asks for."""

    key: str
    """Of the run file, under which the run looks for addresses: `rollout.addresses`."""
    index: int
    """Among those of that key."""
    model: Path
    dtype: str
    section: NucleusSection

    @property
    def gpus(self) -> int:
        """That it runs on."""
        return math.prod(ranks(self.section.arguments))


@dataclass(frozen=True)
class Needs:
    """Nodes and processes of a run."""

    output: str
    """Empty where the verb has none."""
    trains: bool
    """Has it a trainer?"""
    nodes: int
    """Of the trainer; 1 of a verb that trains nothing."""
    processes: int
    """Of the trainer on each of them."""
    fleet: list[list[Engine]]
    """Engines of each node of the fleet."""

    def assignments(self) -> str:
        """For a shell."""
        values = {
            "OUTPUT": self.output,
            "TRAINS": int(self.trains),
            "NODES": self.nodes,
            "PROCESSES": self.processes,
            "FLEET_NODES": len(self.fleet),
        }
        return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def needs(run: dict[str, Any], gpus_per_node: int) -> Needs:
    """What a resolved run file asks for.

    Args:
        run: the file, defaults included.
        gpus_per_node: 0 on nodes without any, where each engine has a node of its own.

    Raises:
        ConfigError: an engine that is larger than a node; engines that have addresses or a token already.
    """
    nodes, processes = trainer(run["parallel"]) if "parallel" in run else (1, 1)
    if processes > gpus_per_node > 0:
        raise ConfigError(
            f"[parallel] asks for {processes} processes on a node of {gpus_per_node} GPUs: set parallel.processes = "
            f"{gpus_per_node}"
        )
    return Needs(run.get("output", ""), "parallel" in run, nodes, processes, deal(list(engines(run)), gpus_per_node))


def trainer(parallel: dict[str, Any]) -> tuple[int, int]:
    """Nodes of a [parallel], and processes on each."""
    known = {key: value for key, value in parallel.items() if key in ParallelSection.model_fields}
    return ParallelSection.model_validate(known).machines


def engines(run: dict[str, Any], key: str = "") -> Iterator[Engine]:
    """Those of every table that has a `rollout`, which serves the model named beside it."""
    if "rollout" in run:
        known = {name: value for name, value in run["rollout"].items() if name in NucleusSection.model_fields}
        section, model = NucleusSection.model_validate(known), run.get("model", run)
        if section.addresses or section.token_env != NucleusSection.model_fields["token_env"].default:
            raise ConfigError(
                f"{key}rollout: `addresses` and `token_env` are for the cluster's scripts to say: remove them"
            )
        for index in range(section.engines):
            yield Engine(f"{key}rollout.addresses", index, Path(model["path"]), model["dtype"], section)
    for name, part in run.items():
        if isinstance(part, dict) and name not in {"rollout", "model"}:
            yield from engines(part, f"{key}{name}.")


def deal(wanted: Sequence[Engine], gpus_per_node: int) -> list[list[Engine]]:
    """Engines of each node: as many, in their order, as its GPUs serve."""
    nodes: list[list[Engine]] = []
    free = 0
    for engine in wanted:
        if engine.gpus > max(gpus_per_node, 1):
            raise ConfigError(
                f"{engine.key}: an engine runs on {engine.gpus} GPUs, but a node has {gpus_per_node}; make it smaller "
                "(--tensor-parallel-size in `arguments`), or start such engines by hand (docs/fleet.md)"
            )
        if free < engine.gpus:
            nodes.append([])
            free = max(gpus_per_node, 1)
        nodes[-1].append(engine)
        free -= engine.gpus
    return nodes


def main() -> int:
    """Print the assignments; 2 where the run file cannot be served."""
    parser = argparse.ArgumentParser(description="What a run file asks of a cluster.")
    parser.add_argument("--gpus-per-node", type=int, default=0)
    options = parser.parse_args()
    try:
        print(needs(tomllib.loads(sys.stdin.read()), options.gpus_per_node).assignments())
    except UserError as error:
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
