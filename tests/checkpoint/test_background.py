"""Writing in the background: what is written is the state at `save`, one checkpoint at a time, whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.errors import NumericsError
from megatron_r1.model.mapping import weights
from megatron_r1.train.policy import Policy
from tests.checkpoint.conftest import MakePolicy, train

ROOT = Path(__file__).parents[2]


def store(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointSection(every=1, keep=3, asynchronous=True), {"seed": 0})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_training_goes_on_meanwhile_and_does_not_reach_the_checkpoint(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy, checkpoints = make_policy(), store(tmp_path)
    train(policy, 0, 2)
    reference = [{name: tensor.clone() for name, tensor in weights(policy.model.chunks[0]).items()}]
    expected = [tensor.clone() for tensor in reference[0].values()]
    checkpoints.save(2, policy.trainable, {"reference": reference}, {})
    for tensor in reference[0].values():
        tensor.zero_()
    later = train(policy, 2, 3)
    checkpoints.finish()
    for tensor in reference[0].values():
        tensor.fill_(1)

    resumed = make_policy(seed=1)
    checkpoints.load(2, resumed.trainable, {"reference": reference})
    for found in (weights(resumed.model.chunks[0]), reference[0]):
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    assert train(resumed, 2, 3) == later
    assert not all(torch.equal(a, b) for a, b in zip(weights(policy.model.chunks[0]).values(), expected, strict=True))


def test_it_gets_its_name_at_a_later_step(small: Policy, tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(1, small.trainable, {}, {})
    assert names(tmp_path) == ["step_00000001.partial"]
    while not (tmp_path / "step_00000001").exists():
        checkpoints.due(2, 9)
    assert names(tmp_path) == ["step_00000001"]


def test_the_next_one_waits_for_it(small: Policy, tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for done in (1, 2, 3):
        checkpoints.save(done, small.trainable, {}, {})
        assert names(tmp_path) == [*(f"step_{step:08d}" for step in range(1, done)), f"step_{done:08d}.partial"]
    assert checkpoints.latest() == 3
    assert names(tmp_path) == [f"step_{step:08d}" for step in (1, 2, 3)]


def test_the_end_of_a_run_waits_for_it(small: Policy, tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    with checkpoints.running(print):
        checkpoints.save(1, small.trainable, {}, {})
    assert names(tmp_path) == ["step_00000001"]


def test_a_run_that_is_stopped_by_its_figures_waits_for_it(small: Policy, tmp_path: Path) -> None:
    checkpoints = store(tmp_path)

    def step() -> None:
        checkpoints.save(1, small.trainable, {}, {})
        raise NumericsError("the loss is nan")

    with pytest.raises(NumericsError), checkpoints.running(print):
        step()
    assert names(tmp_path) == ["step_00000001"]


def test_it_is_what_is_written_in_the_foreground(small: Policy, tmp_path: Path) -> None:
    foreground = Checkpoints(tmp_path / "foreground", CheckpointSection(every=1), {"seed": 0})
    background = store(tmp_path / "background")
    for checkpoints in (foreground, background):
        checkpoints.save(1, small.trainable, {}, {"figure": 1.0})
        checkpoints.finish()
    found, expected = (content(one.folder / "step_00000001") for one in (background, foreground))
    files = [name for name in expected if name.endswith(".distcp")]
    assert len(files) == 2
    assert {name: found[name] for name in files} == {name: expected[name] for name in files}


def test_a_run_killed_meanwhile_goes_on_from_the_one_before(make_policy: MakePolicy, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.killed_program", str(tmp_path / "checkpoints")]
    killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002.partial"]
    policy, checkpoints = make_policy(num_hidden_layers=2), store(tmp_path / "checkpoints")
    assert checkpoints.latest() == 1
    assert checkpoints.warnings == []
    assert checkpoints.load(1, policy.trainable, {}) == {"done": 1.0}
    train(policy, 1, 1)
    checkpoints.save(2, policy.trainable, {}, {})
    assert checkpoints.latest() == 2
    assert names(checkpoints.folder) == ["step_00000001", "step_00000002"]
