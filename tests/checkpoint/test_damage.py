"""Whatever is done to any file of a checkpoint is noticed by name, and the run goes on from the one before."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.errors import DataError
from megatron_r1.train.policy import Policy

FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "manifest.json", "metadata.json"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flipped_at(share: float) -> Callable[[Path], None]:
    def flipped(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flipped


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "emptied": emptied,
    "longer": longer,
    "first byte": flipped_at(0),
    "a byte": flipped_at(0.37),
    "last byte": flipped_at(1),
    "deleted": Path.unlink,
}


def store(folder: Path, **section: object) -> Checkpoints:
    return Checkpoints(folder, CheckpointSection.model_validate({"every": 1, "keep": 2} | section), {"seed": 0})


@pytest.fixture(scope="module")
def whole(small: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2."""
    folder = tmp_path_factory.mktemp("whole")
    for done in (1, 2):
        store(folder).save(done, small.trainable, {}, {"done": float(done)})
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """This test's own copy of `whole`."""
    return shutil.copytree(whole, tmp_path / "checkpoints")


def test_a_checkpoint_has_these_files(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "step_00000002").iterdir()) == FILES
    assert store(whole).latest() == 2


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_named(small: Policy, damaged: Path, name: str, how: str) -> None:
    DAMAGES[how](damaged / "step_00000002" / name)
    checkpoints = store(damaged)
    assert checkpoints.latest() == 1
    [warning] = checkpoints.warnings
    assert re.fullmatch(rf"going on from step 1: \S*/step_00000002 is damaged \({re.escape(name)} .*\)", warning)


def test_the_previous_one_is_loaded_and_the_damaged_one_replaced(small: Policy, damaged: Path) -> None:
    (damaged / "step_00000002/common.pt").unlink()
    checkpoints = store(damaged, keep=1)
    said: list[str] = []
    assert checkpoints.latest() == 1
    assert checkpoints.load(1, small.trainable, {}) == {"done": 1.0}
    with checkpoints.running(said.append):
        checkpoints.save(2, small.trainable, {}, {"done": 2.5})
    assert said == [f"warning: {warning}" for warning in checkpoints.warnings] != []
    again = store(damaged)
    assert (again.latest(), again.warnings) == (2, [])
    assert again.load(2, small.trainable, {}) == {"done": 2.5}
    assert [path.name for path in damaged.iterdir()] == ["step_00000002"]


def test_a_newer_damaged_one_does_not_push_out_the_whole_ones(small: Policy, damaged: Path) -> None:
    """A run that goes back and saves before it has come as far again."""
    (damaged / "step_00000002").rename(damaged / "step_00000009")
    (damaged / "step_00000009/.metadata").unlink()
    checkpoints = store(damaged, keep=2)
    assert checkpoints.latest() == 1
    checkpoints.save(5, small.trainable, {}, {})
    assert store(damaged).latest() == 5
    assert sorted(path.name for path in damaged.iterdir()) == ["step_00000001", "step_00000005"]


@pytest.mark.parametrize("name", FILES)
def test_a_step_counts_only_if_the_critic_of_the_same_step_is_whole(damaged: Path, name: str) -> None:
    critic = shutil.copytree(damaged, damaged / "critic")
    assert store(damaged).latest(store(critic)) == 2
    flipped_at(0.37)(critic / "step_00000002" / name)
    checkpoints = store(damaged)
    assert checkpoints.latest(store(critic)) == 1
    [warning] = checkpoints.warnings
    assert re.fullmatch(rf"going on from step 1: \S*/critic/step_00000002 is damaged \({re.escape(name)} .*\)", warning)
    shutil.rmtree(critic / "step_00000001")
    with pytest.raises(DataError, match=r"critic/step_00000001 is damaged \(manifest.json is missing\)"):
        store(damaged).latest(store(critic))


def test_without_a_whole_one_every_problem_is_named(damaged: Path) -> None:
    flipped_at(0.5)(damaged / "step_00000001/__0_1.distcp")
    (damaged / "step_00000002/__0_0.distcp").unlink()
    with pytest.raises(DataError) as caught:
        store(damaged).latest()
    message = str(caught.value)
    assert re.search(r"step_00000002 is damaged \(__0_0.distcp is missing\)", message)
    assert re.search(r"step_00000001 is damaged \(__0_1.distcp has been altered", message)
    assert "to begin anew" in message


def test_the_checksums_are_those_of_the_files(whole: Path) -> None:
    folder = whole / "step_00000002"
    listed = json.loads((folder / manifest.NAME).read_text())["files"]
    assert sorted(listed) == sorted(set(FILES) - {manifest.NAME})
    for name, entry in listed.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_a_file_of_several_blocks_is_hashed_whole(tmp_path: Path) -> None:
    content = torch.randint(256, (2**22 + 5,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "file").write_bytes(content)
    expected = manifest.Entry(len(content), xxhash.xxh3_128_hexdigest(content))
    assert manifest.entry_of(tmp_path / "file") == expected
