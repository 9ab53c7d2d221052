"""What a run file asks of a cluster, as assignments for a shell; the resolved file comes on standard input.

    megatron-r1 rl run.toml --dry-run | python -m megatron_r1.cluster.needs --gpus-per-node=8

The run file alone says how many nodes there have to be: [parallel] those of the trainer; `engines`, their arguments and
[reward_models] those of the fleet.
"""

import argparse
import math
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_r1.config.asynchrony import AheadSection
from megatron_r1.config.engine_arguments import PLACEMENT, by_name, ranks
from megatron_r1.config.evaluation import NucleusSection
from megatron_r1.config.load import validate
from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.config.section import Section
from megatron_r1.config.sections import ParallelSection, RolloutSection
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.wording import counted

S = TypeVar("S", bound=Section)
ELSEWHERE = "http://node:1"
"""Stands for an address that is not known before the engines run."""


@dataclass(frozen=True)
class Engine:
    """One vLLM server that a run file asks for."""

    key: str
    """Of the run file, under which the run looks for addresses: `rollout.addresses`, `reward_models.safe.address`."""
    index: int
    """Among those of that key."""
    model: Path
    dtype: str
    section: RolloutSection | RewardModelServerSection

    @property
    def gpus(self) -> int:
        """That it runs on."""
        return math.prod(ranks(self.section.arguments))


@dataclass(frozen=True)
class Part:
    """What one node runs of an engine: all of it, or its share of one that spans nodes."""

    engine: Engine
    rank: int = 0
    """Among the parts, which are on neighbouring nodes; 0 is the head, which alone answers requests."""
    nodes: int = 1
    """Parts that the engine has."""

    @property
    def gpus(self) -> int:
        """Of the node."""
        return self.engine.gpus // self.nodes


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
    fleet: list[list[Part]]
    """What each node of the fleet runs."""

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
        gpus_per_node: 0 on nodes without any, where each rank of an engine has a node of its own.

    Raises:
        ConfigError: an engine that nodes cannot share evenly; engines that have addresses, a token or places already.
    """
    nodes, processes = trainer(run["parallel"]) if "parallel" in run else (1, 1)
    if processes > gpus_per_node > 0:
        raise ConfigError(
            f"[parallel] asks for {processes} processes on a node of {counted(gpus_per_node, 'GPU')}: "
            f"set parallel.processes = {gpus_per_node}"
        )
    return Needs(run.get("output", ""), "parallel" in run, nodes, processes, deal(list(engines(run)), gpus_per_node))


def trainer(parallel: dict[str, Any]) -> tuple[int, int]:
    """Nodes of a [parallel], and processes on each."""
    known = {key: value for key, value in parallel.items() if key in ParallelSection.model_fields}
    return ParallelSection.model_validate(known).machines


def engines(run: dict[str, Any], key: str = "") -> Iterator[Engine]:
    """Those of every table that has a `rollout`, which serves the model named beside it; then the reward models.

    Raises:
        ConfigError: one that has an address, a token or a place already.
    """
    if "rollout" in run:
        # What `rl` alone has says, too, how engines start; what is only sampled from may have the temperature 0.
        kind = AheadSection if "routing_replay" in run["rollout"] else NucleusSection
        section, model = _known(kind, run["rollout"]), run.get("model", run)
        _check(f"{key}rollout", section, bool(section.addresses))
        for index in range(section.engines):
            served = section.served(Path(model["path"]))
            yield Engine(f"{key}rollout.addresses", index, served, model["dtype"], section)
    for name, part in run.items():
        if isinstance(part, dict) and name not in {"rollout", "model", "reward_models"}:
            yield from engines(part, f"{key}{name}.")
    servers = {name: _known(RewardModelServerSection, part) for name, part in run.get("reward_models", {}).items()}
    for name, server in sorted(servers.items(), key=lambda pair: pair[1].port):  # so port + place tells them apart
        _check(f"{key}reward_models.{name}", server, server.address is not None)
        yield Engine(f"{key}reward_models.{name}.address", 0, server.path, server.dtype, server)


def check_elsewhere(run: dict[str, Any]) -> None:
    """Look whether the engines of a resolved run file can be on nodes of their own, before there are any.

    Raises:
        ConfigError: a setting that goes with engines beside the trainer alone, as the run says it when it is told their
            addresses.
    """
    for engine in engines(run):
        if isinstance(engine.section, RolloutSection):
            told = engine.section.model_dump(mode="json", exclude_none=True) | {"addresses": [ELSEWHERE]}
            validate(type(engine.section), told, where=engine.key.removesuffix(".addresses"))


def _known(kind: type[S], part: dict[str, Any]) -> S:
    """The section, without keys that only a verb's own kind of it has."""
    return kind.model_validate({name: value for name, value in part.items() if name in kind.model_fields})


def _check(key: str, section: RolloutSection | RewardModelServerSection, has_address: bool) -> None:
    if has_address or section.token_env != type(section).model_fields["token_env"].default:
        raise ConfigError(
            f"{key}: addresses and `token_env` are for the cluster's scripts to say: remove them from the run file"
        )
    if given := sorted(PLACEMENT & by_name(section.arguments).keys()):
        raise ConfigError(
            f"{key}.arguments: on which nodes the ranks of an engine are is for the cluster's scripts to say, from its "
            f"sizes (--tensor-parallel-size and the like): remove {', '.join(f'--{name}' for name in given)}"
        )


def deal(wanted: Sequence[Engine], gpus_per_node: int) -> list[list[Part]]:
    """What each node runs: as many engines, in their order, as its GPUs serve; a larger one has nodes of its own.

    Raises:
        ConfigError: an engine that nodes cannot share evenly.
    """
    per_node = max(gpus_per_node, 1)
    nodes: list[list[Part]] = []
    free = 0
    for engine in wanted:
        if engine.gpus > per_node:
            count = spanned(engine, per_node)
            nodes += [[Part(engine, rank, count)] for rank in range(count)]
            free = 0
            continue
        if free < engine.gpus:
            nodes.append([])
            free = per_node
        nodes[-1].append(Part(engine))
        free -= engine.gpus
    return nodes


def spanned(engine: Engine, per_node: int) -> int:
    """Nodes of an engine that is larger than one: the fewest, if each runs whole replicas or an even share of one.

    Raises:
        ConfigError: it does not divide so.
    """
    tensor, pipeline, data = ranks(engine.section.arguments)
    replica, count = tensor * pipeline, math.ceil(engine.gpus / per_node)
    here, rest = divmod(engine.gpus, count)
    if rest or (here % replica and replica % here):
        raise ConfigError(
            f"{engine.key}: it runs on {engine.gpus} GPUs (tensor {tensor} x pipeline {pipeline} x data {data}), "
            f"which {count} nodes of {per_node} cannot share evenly, with whole replicas of {replica} GPUs on each, "
            "or whole nodes to each replica: change the sizes in `arguments`"
        )
    return count


def main() -> int:
    """Print the assignments; 2 where the run file cannot be served."""
    parser = argparse.ArgumentParser(description="What a run file asks of a cluster.")
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--elsewhere", action="store_true", help="its engines will be on nodes of their own: can they?")
    options = parser.parse_args()
    try:
        run = tomllib.loads(sys.stdin.read())
        print(needs(run, options.gpus_per_node).assignments())
        if options.elsewhere:
            check_elsewhere(run)
    except UserError as error:
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
