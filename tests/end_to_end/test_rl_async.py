"""Reinforcement learning that samples while it trains, with a real engine: killed, resumed, nothing skipped."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end import runs
from tests.end_to_end.runs import Command, checkpoint, rows

pytestmark = pytest.mark.timeout(1800)  # several starts of vLLM in one test


def ahead(prepared: Path, output: Path, port: int) -> dict[str, Any]:
    """Four steps with routing replay, the weights one step old at most; no KL penalty, so none is computed."""
    tree = runs.rl(prepared, output, port)
    rollout = tree["rollout"] | {"dispatch": "continuous", "max_staleness": 1, "routing_replay": True}
    return tree | {"steps": 4, "rollout": rollout, "loss": {"type": "grpo"}}


def in_flight(output: Path, done: int) -> dict[str, Any]:
    """What a checkpoint has of the groups that are begun."""
    content = torch.load(output / f"checkpoints/step_{done:08d}/common.pt", weights_only=True)
    kept: dict[str, Any] = content["figures"]["in_flight"]
    return kept


@pytest.mark.parametrize("change", ["partial_rollouts", "at_group_borders"])
def test_killed_and_resumed_every_question_is_trained_on_once(prepared: Path, tmp_path: Path, change: str) -> None:
    output, port = tmp_path / "run", runs.free_port()
    run_file = runs.write(tmp_path / "rl.toml", ahead(prepared, output, port))
    option = f"--rollout.weights_change={change}"
    with Command("rl", run_file, option) as command:
        command.until(checkpoint(output, 2), seconds=900).send(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL
    ledger = in_flight(output, 2)["ledger"]
    assert ledger["step"] == 2
    assert {int(key.partition(":")[2]) for key, _, _ in ledger["live"]} <= set(range(4 * 4)), "of no later step"
    with Command("rl", run_file, option) as command:
        assert command.end(900) == 0, command.message()
    assert runs.is_free(port)
    found = rows(output)
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    idle = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for row in [one for one in idle if one["kind"] == "step"]:
        assert 0 <= row["learner_idle"] <= 1
        assert 0 <= row["fleet_idle"] <= 1
    for row in found:
        shares = [row.get(f"staleness/{age}", 0.0) for age in (0, 1)]
        assert sum(shares) == pytest.approx(1), "older than allowed"
        assert 0.5 < row["importance_ratio"] < 2
    assert any(row["staleness"] > 0 for row in found), "nothing was sampled while the learner trained"
    assert found[0]["logprob_difference_mean"] < 1e-5
    assert found[0]["rerouted_choices"] < 1e-2, "engine and learner are both in float32"
    end = in_flight(output, 4)
    assert end["ledger"]["live"] == []
    assert end["order"]["drawn"] == {"data": 16}, "16 questions were begun, and none is left: each was trained on once"
    assert sum(count for _, count in end["ledger"]["staleness"]) == 16


def test_two_processes_and_groups_without_advantage(prepared: Path, tmp_path: Path) -> None:
    """Each rank rebuilds the questions of the groups that the first one has."""
    output, port = tmp_path / "run", runs.free_port()
    tree = ahead(prepared, output, port)
    tree |= {"dynamic_sampling": {"max_rounds": 2}, "correction": {"kind": "sequence", "cap": 3.0}, "steps": 2}
    tree["rewards"].pop("digits")
    run_file = runs.write(tmp_path / "rl.toml", tree)
    with Command("rl", run_file, "--parallel.processes=2") as command:
        assert command.end(900) == 0, command.message()
    found = rows(output)
    end = in_flight(output, 2)
    replaced = sum(int(row["dropped_groups"]) for row in found)
    assert end["ledger"]["dropped"] >= replaced > 0
    assert end["order"]["drawn"]["data"] == 8 + end["ledger"]["dropped"] + len(end["ledger"]["live"])
    assert all(row["importance_changed"] >= 0 for row in found)
