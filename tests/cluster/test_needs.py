"""How many nodes a run file asks for, and which engines stand on which."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.cluster.needs import deal, engines, needs, trainer
from megatron_r1.errors import ConfigError


def rollout(engines: int, *arguments: str) -> dict[str, Any]:
    return {"engines": engines, "max_model_len": 64, "max_tokens": 32, "arguments": list(arguments), "port": 9600}


def rl(**changes: Any) -> dict[str, Any]:
    model = {"path": "models/v3", "dtype": "bfloat16"}
    return {"output": "runs/rl", "model": model, "rollout": rollout(4), "parallel": {}} | changes


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, (1, 1)),
        ({"tensor": 2, "pipeline": 2}, (1, 4)),  # as many as hold the model
        ({"tensor": 2, "pipeline": 16, "expert": 64, "processes": 8}, (128, 8)),  # 64 x 16 ranks
        ({"tensor": 2, "pipeline": 16, "expert": 64, "processes": 8, "nodes": 256}, (256, 8)),  # two replicas
        ({"pipeline": 4, "nodes": 2}, (2, 2)),
    ],
)
def test_nodes_of_the_trainer(parallel: dict[str, Any], expected: tuple[int, int]) -> None:
    assert trainer(parallel) == expected


def test_more_processes_than_a_node_has_gpus() -> None:
    with pytest.raises(ConfigError, match=r"16 processes on a node of 8 GPUs: set parallel.processes = 8"):
        needs(rl(parallel={"tensor": 16}), 8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 1),
        (["--tensor-parallel-size=8"], 8),
        (["-tp", "4", "--pipeline-parallel-size", "2"], 8),
        (["--max-num-batched-tokens=8192"], 1),
    ],
)
def test_gpus_of_an_engine(arguments: list[str], expected: int) -> None:
    [engine] = engines(rl(rollout=rollout(1, *arguments)))
    assert engine.gpus == expected


def test_engines_fill_nodes_in_order() -> None:
    small, large = (list(engines(rl(rollout=rollout(3, f"-tp={size}")))) for size in (2, 8))
    assert [len(node) for node in deal([*small, *large[:2]], 8)] == [3, 1, 1]  # no large one fits beside the small
    assert [len(node) for node in deal(small, 4)] == [2, 1]
    assert [len(node) for node in deal(list(engines(rl())), 0)] == [1, 1, 1, 1]  # no GPUs: one a node


def test_an_engine_larger_than_a_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 GPUs, but a node has 8"):
        needs(rl(rollout=rollout(1, "-tp=16")), 8)


@pytest.mark.parametrize("given", [{"addresses": ["http://node7:8700"]}, {"token_env": "MINE"}], ids=str)
def test_what_the_scripts_say_is_refused_in_the_run_file(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="remove them"):
        needs(rl(rollout=rollout(1) | given), 8)


def test_every_model_of_collect_has_its_engines() -> None:
    model = {"path": "models/x", "dtype": "bfloat16"}
    run = {"output": "runs/c", "models": {"a": model | {"rollout": rollout(2)}, "b": model | {"rollout": rollout(1)}}}
    found = needs(run, 2)
    assert [[(engine.key, engine.index) for engine in node] for node in found.fleet] == [
        [("models.a.rollout.addresses", 0), ("models.a.rollout.addresses", 1)],
        [("models.b.rollout.addresses", 0)],
    ]
    assert not found.trains


def test_a_verb_without_models_needs_one_node() -> None:
    assert needs({"output": "runs/corpus"}, 8).assignments().split() == [
        "OUTPUT=runs/corpus", "TRAINS=0", "NODES=1", "PROCESSES=1", "FLEET_NODES=0",
    ]  # fmt: skip


def test_the_shell_gets_what_the_command_line_resolves(rl_file: Path) -> None:
    """From a file to assignments, as the job's script does it; a value cannot break out of its quotes."""
    changed = ["--rollout.engines=3", "--output=runs/a $(touch broken) 'b'"]
    resolved = subprocess.run(
        [sys.executable, "-m", "megatron_r1.cli", "rl", str(rl_file), *changed, "--dry-run"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    script = 'eval "$("$0" -m megatron_r1.cluster.needs --gpus-per-node=2)"; echo "$FLEET_NODES|$OUTPUT"'
    command = ["bash", "-c", script, sys.executable]
    done = subprocess.run(command, input=resolved, text=True, capture_output=True, check=False)
    assert done.stdout.strip() == "2|runs/a $(touch broken) 'b'", done.stderr
