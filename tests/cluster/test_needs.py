"""How many nodes a run file asks for, and which engines stand on which."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cluster.needs import check_elsewhere, deal, engines, needs, trainer
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError

ROOT = Path(__file__).parents[2]


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


def test_engines_larger_than_a_node() -> None:
    """Of 1 + 2 x 12 + 1 GPUs on nodes of 8: a node for the first, two of 6 for each large one, none shared with it."""
    (small,) = engines(rl(rollout=rollout(1)))
    large = list(engines(rl(rollout=rollout(2, "-tp=12"))))
    dealt = deal([small, *large, small], 8)
    assert [[(part.engine.gpus, part.rank, part.nodes, part.gpus) for part in node] for node in dealt] == [
        [(1, 0, 1, 1)],
        [(12, 0, 2, 6)], [(12, 1, 2, 6)],
        [(12, 0, 2, 6)], [(12, 1, 2, 6)],
        [(1, 0, 1, 1)],
    ]  # fmt: skip
    assert [part.engine.index for node in dealt for part in node] == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "gpus_per_node", "expected"),
    [
        (["-tp=16"], 8, 2),
        (["-dp=32", "--enable-expert-parallel"], 8, 4),  # 8 whole replicas on each
        (["-tp=8", "-pp=4"], 8, 4),  # a quarter of one on each
        (["-tp=8", "-dp=2"], 4, 4),  # two nodes to each of two replicas
        (["-tp=2"], 0, 2),  # no GPUs: one rank a node
        (["-tp=4", "-dp=3"], 8, "12 GPUs (tensor 4 x pipeline 1 x data 3), which 2 nodes of 8 cannot share evenly"),
        (["-tp=9"], 8, "9 GPUs (tensor 9 x pipeline 1 x data 1), which 2 nodes of 8 cannot share evenly"),
    ],
    ids=str,
)
def test_nodes_of_an_engine(arguments: list[str], gpus_per_node: int, expected: int | str) -> None:
    run = rl(rollout=rollout(1, *arguments))
    if isinstance(expected, int):
        assert len(needs(run, gpus_per_node).fleet) == expected
        return
    with pytest.raises(ConfigError, match=re.escape(expected)):
        needs(run, gpus_per_node)


def test_engines_start_as_the_verb_says() -> None:
    """Keys that only `rl` has, and a temperature that only sampling verbs have."""
    (recording,) = engines(rl(rollout=rollout(1) | {"routing_replay": True, "max_staleness": 0}))
    assert isinstance(recording.section, RolloutSection)
    assert recording.section.returns_experts
    (eight,) = engines(rl(rollout=rollout(1) | {"routing_replay": False, "fp8_path": "models/fp8"}))
    assert (recording.model, eight.model) == (Path("models/v3"), Path("models/fp8"))
    (greedy,) = engines(rl(rollout=rollout(1) | {"temperature": 0.0, "top_p": 0.9}))
    assert isinstance(greedy.section, RolloutSection)
    assert greedy.section.temperature == 0


def test_reward_models_have_places_behind_the_engines() -> None:
    """In the order of their ports, so that port + place is another for each."""
    served = {"path": "models/rm", "port": 8721}
    models = {"safe": served, "helpful": served | {"port": 8720, "arguments": ["-tp=16"]}}
    run = rl(rollout=rollout(3, "-tp=2"), reward_models=models)
    assert [[(part.engine.key, part.rank) for part in node] for node in needs(run, 8).fleet] == [
        [("rollout.addresses", 0)] * 3,
        [("reward_models.helpful.address", 0)],
        [("reward_models.helpful.address", 1)],
        [("reward_models.safe.address", 0)],
    ]


@pytest.mark.parametrize("given", [{"addresses": ["http://node7:8700"]}, {"token_env": "MINE"}], ids=str)
def test_what_the_scripts_say_is_refused_in_the_run_file(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="remove them"):
        needs(rl(rollout=rollout(1) | given), 8)
    given = {"address": "http://node7:8700"} if "addresses" in given else given
    with pytest.raises(ConfigError, match=r"^reward_models\.safe: .* remove them"):
        needs(rl(reward_models={"safe": {"path": "models/rm"} | given}), 8)


@pytest.mark.parametrize("given", ["--nnodes=2", "-n 2", "--node_rank=1", "-dpl=8", "--headless"])
def test_where_ranks_are_is_refused_in_the_run_file(given: str) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.arguments: on which nodes .* remove --"):
        needs(rl(rollout=rollout(1, "-tp=16", *given.split())), 8)


@pytest.mark.parametrize(
    "setting", ["sleep=true", "transport=shared_memory", "transport=ipc", "first_gpu=4", "transport=disk"]
)
def test_what_does_not_go_with_engines_elsewhere_is_refused_as_the_run_refuses_it(rl_file: Path, setting: str) -> None:
    """Before any engine has an address, in the words that the run has for engines at addresses."""
    own, there = f"--rollout.{setting}", '--rollout.addresses=["http://node7:8700"]'
    run = load(rl_file, [own], RLConfig).model_dump(mode="json", exclude_none=True)
    if setting == "transport=disk":
        check_elsewhere(run)
        load(rl_file, [own, there], RLConfig)
        return
    with pytest.raises(ConfigError) as early:
        check_elsewhere(run)
    with pytest.raises(ConfigError) as late:
        load(rl_file, [own, there], RLConfig)
    assert str(late.value) == f"{rl_file}: {early.value}"


def test_the_shell_is_told_of_engines_that_cannot_be_elsewhere(rl_file: Path) -> None:
    run = tomli_w.dumps(load(rl_file, ["--rollout.sleep=true"], RLConfig).model_dump(mode="json", exclude_none=True))
    command = [sys.executable, "-m", "megatron_r1.cluster.needs", "--gpus-per-node=8"]
    found = [
        subprocess.run([*command, *more], input=run, text=True, capture_output=True, check=False)
        for more in ([], ["--elsewhere"])
    ]
    assert [done.returncode for done in found] == [0, 2]
    assert "rollout: sleep gives a GPU's memory back" in found[1].stderr


def test_every_model_of_collect_has_its_engines() -> None:
    model = {"path": "models/x", "dtype": "bfloat16"}
    run = {"output": "runs/c", "models": {"a": model | {"rollout": rollout(2)}, "b": model | {"rollout": rollout(1)}}}
    found = needs(run, 2)
    assert [[(part.engine.key, part.engine.index) for part in node] for node in found.fleet] == [
        [("models.a.rollout.addresses", 0), ("models.a.rollout.addresses", 1)],
        [("models.b.rollout.addresses", 0)],
    ]
    assert not found.trains


def test_a_verb_without_models_needs_one_node() -> None:
    assert needs({"output": "runs/corpus"}, 8).assignments().split() == [
        "OUTPUT=runs/corpus", "TRAINS=0", "NODES=1", "PROCESSES=1", "FLEET_NODES=0",
    ]  # fmt: skip


def test_a_stage_of_the_671b() -> None:
    """As the job's script does it: three engines on four nodes each, two reward models on two."""
    resolved = subprocess.run(
        [sys.executable, "-m", "megatron_r1.cli", "run", "examples/r1_671b/recipe.toml", "--stage=r1"],
        check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    found = needs(tomllib.loads(resolved), 8)
    assert (found.nodes, found.processes, len(found.fleet)) == (48, 8, 3 * 4 + 2 * 2)


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
