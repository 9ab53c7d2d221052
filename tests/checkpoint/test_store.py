"""Saving and loading: everything comes back bit for bit, and what cannot be used is refused by name."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.sections import OptimSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.mapping import weights
from megatron_r1.train.policy import Policy
from megatron_r1.train.reference import Reference
from tests.checkpoint.conftest import MakePolicy, train


def moments(policy: Policy) -> list[torch.Tensor]:
    """Adam's moments of every parameter, in the order of the parameters."""
    states = [adam.optimizer.state for adam in policy.trainable.optimizer.chained_optimizers]
    return [state[key] for values in states for state in values.values() for key in ("exp_avg", "exp_avg_sq")]


def own(policy: Policy) -> list[torch.Tensor]:
    """The weights."""
    return list(weights(policy.model.chunks[0]).values())


def all_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def store(folder: Path, every: int = 1, keep: int = 2, seed: int = 0) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", CheckpointSection(every=every, keep=keep), {"seed": seed})


@pytest.fixture
def saved(once_saved: Path, tmp_path: Path) -> Checkpoints:
    """Step 1 of `small`, this test's own."""
    shutil.copytree(once_saved, tmp_path, dirs_exist_ok=True)
    return store(tmp_path)


@pytest.fixture(scope="module")
def once_saved(small: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    store(folder).save(1, small.trainable, {}, {})
    return folder


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_everything_comes_back_and_training_goes_on_as_if_nothing_had_happened(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy, checkpoints = make_policy(), store(tmp_path)
    reference = Reference(policy, every=2)
    train(policy, 0, 2)
    reference.refresh(2)
    train(policy, 2, 1)  # now the reference is neither the start nor the policy
    torch.rand(5)
    checkpoints.save(3, policy.trainable, {"reference": reference.weights}, {"accuracy": 0.1, "third": 1 / 3})
    expected = {
        "weights": [tensor.clone() for tensor in own(policy)],
        "reference": [tensor.clone() for tensor in reference.weights[0].values()],
        "moments": [tensor.clone() for tensor in moments(policy)],
        "random": torch.rand(5),
        "later": train(policy, 3, 4),
    }
    assert not all_equal(expected["reference"], expected["weights"])

    resumed = make_policy(seed=1)
    reference = Reference(resumed, every=2)
    figures = checkpoints.load(3, resumed.trainable, {"reference": reference.weights})
    assert figures == {"accuracy": 0.1, "third": 1 / 3}
    assert all_equal(own(resumed), expected["weights"])
    assert all_equal(list(reference.weights[0].values()), expected["reference"])
    assert len(expected["moments"]) > 100
    assert all_equal(moments(resumed), expected["moments"])
    assert torch.equal(torch.rand(5), expected["random"])
    assert train(resumed, 3, 4) == expected["later"]
    assert all_equal(own(resumed), own(policy))


def test_the_run_file_sets_the_schedule_of_a_resumed_run(make_policy: MakePolicy, tmp_path: Path) -> None:
    """As if the run had been started with the new settings: same place in a schedule of its own length."""
    policy, checkpoints = make_policy(), store(tmp_path)
    train(policy, 0, 3)
    checkpoints.save(3, policy.trainable, {}, {})
    changed = OptimSection(lr=3e-3, min_lr=1e-3, schedule="linear", warmup_steps=1, weight_decay=0.0)
    resumed, fresh = make_policy(optim=changed, updates=20), make_policy(optim=changed, updates=20)
    checkpoints.load(3, resumed.trainable, {})
    expected = [row["lr"] for row in train(fresh, 0, 8)][3:]
    assert [row["lr"] for row in train(resumed, 3, 5)] == expected
    assert len(set(expected)) == 5
    assert {group["weight_decay"] for group in resumed.trainable.optimizer.param_groups} == {0.0}


@pytest.mark.parametrize(
    ("every", "keep", "total", "kept"), [(10, 2, 25, [20, 25]), (10, 1, 15, [15]), (1, 3, 2, [1, 2])]
)
def test_the_newest_are_kept(small: Policy, tmp_path: Path, every: int, keep: int, total: int, kept: list[int]) -> None:
    checkpoints, policy = store(tmp_path, every, keep), small
    for done in range(1, total + 1):
        if checkpoints.due(done, total):
            checkpoints.save(done, policy.trainable, {}, {})
            assert checkpoints.latest() == done
    assert names(checkpoints) == [f"step_{done:08d}" for done in kept]


def test_multiples_are_kept_for_ever(small: Policy, tmp_path: Path) -> None:
    section = CheckpointSection(every=1, keep=2, keep_every=4)
    checkpoints = Checkpoints(tmp_path / "checkpoints", section, {"seed": 0})
    for done in range(1, 11):
        checkpoints.save(done, small.trainable, {}, {})
    assert names(checkpoints) == [f"step_{done:08d}" for done in (4, 8, 9, 10)]
    assert checkpoints.kept() == [4, 8, 9, 10]


def test_one_is_due_when_the_minutes_have_passed(small: Policy, tmp_path: Path) -> None:
    section = CheckpointSection(every=1000, every_minutes=60)
    checkpoints = Checkpoints(tmp_path / "checkpoints", section, {"seed": 0})
    assert not checkpoints.due(1, 1000)
    checkpoints._saved -= 60 * 60  # an hour later
    assert checkpoints.due(2, 1000)
    checkpoints.save(2, small.trainable, {}, {})
    assert not checkpoints.due(3, 1000)


def test_a_run_that_goes_back_forgets_what_came_after(small: Policy, tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=9)
    for done in (1, 2, 3):
        checkpoints.save(done, small.trainable, {}, {})
    checkpoints.forget_after(1)
    assert names(checkpoints) == ["step_00000001"]


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert store(tmp_path).latest() is None


def test_what_a_killed_run_left_is_ignored_and_cleared_away(small: Policy, tmp_path: Path) -> None:
    checkpoints, policy = store(tmp_path), small
    for name in ("step_00000007.partial", "step_00000009.partial", "notes"):
        (checkpoints.folder / name).mkdir(parents=True)
        (checkpoints.folder / name / "half").write_text("written")
    assert checkpoints.latest() is None
    checkpoints.save(7, policy.trainable, {}, {})
    assert checkpoints.latest() == 7
    assert names(checkpoints) == ["notes", "step_00000007"]
    assert not (checkpoints.folder / "step_00000007/half").exists()


def test_a_step_may_be_saved_again(small: Policy, tmp_path: Path) -> None:
    """A critic's is, where the run was killed before the policy's checkpoint of that step was whole."""
    checkpoints, policy = store(tmp_path), small
    checkpoints.save(1, policy.trainable, {}, {"figure": 1.0})
    checkpoints.save(1, policy.trainable, {}, {"figure": 2.0})
    assert checkpoints.load(1, policy.trainable, {}) == {"figure": 2.0}
    assert names(checkpoints) == ["step_00000001"]


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 32}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"num_nextn_predict_layers": 0}],
)
def test_a_checkpoint_of_another_model_is_refused(
    saved: Checkpoints, make_policy: MakePolicy, changes: dict[str, object]
) -> None:
    other = make_policy(**({"num_hidden_layers": 2} | changes))
    with pytest.raises(DataError, match=r"step_00000001.*of another model"):
        saved.load(1, other.trainable, {})


def test_a_run_with_another_seed_does_not_go_on_from_it(small: Policy, saved: Checkpoints, tmp_path: Path) -> None:
    policy = small
    before = [param.clone() for param in policy.trainable.chunks[0].parameters()]
    train(policy, 1, 1)
    moved = [param.clone() for param in policy.trainable.chunks[0].parameters()]
    with pytest.raises(ConfigError, match=r"seed = 0, this one has seed = 1"):
        store(tmp_path, seed=1).load(1, policy.trainable, {})
    assert all(torch.equal(a, b) for a, b in zip(policy.trainable.chunks[0].parameters(), moved, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
