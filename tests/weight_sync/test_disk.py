"""A folder on a file system that engines elsewhere see; which transport a run has. Several ranks write one in
tests/distributed/test_weights_on_disk.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_r1.config.sections import ParallelSection, RolloutSection
from megatron_r1.errors import EngineError
from megatron_r1.model.hf_folder import write_index
from megatron_r1.model.parallel import initialize
from megatron_r1.model.shards import stored_tensors
from megatron_r1.rollout.checksum import KEY, VERSION, checksum, checksum_of_all
from megatron_r1.rollout.weights_files import read, version_of
from megatron_r1.weight_sync import weights_file
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import open_sync
from tests.weight_sync.test_shared_memory import ReadingEngine, same, weights


def section(**settings: Any) -> RolloutSection:
    return RolloutSection(max_model_len=8, max_tokens=4, **settings)


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    initialize(ParallelSection(), seed=0)


def push(sync: DiskSync, version: int) -> None:
    sync.push(NamedTensors.of(weights()), version)


def test_the_newest_folder_stays(tmp_path: Path) -> None:
    """It is a folder of Hugging Face's, which the project's own reader checks against its index."""
    engine = ReadingEngine()
    for version in (3, 4, 4):
        push(DiskSync(engine, tmp_path), version)
    assert [(path.name, version) for path, version, _ in engine.updates] == [
        ("weights-3", 3), ("weights-4", 4), ("weights-4", 4)
    ]  # fmt: skip
    assert all(same(read, weights()) for _, _, read in engine.updates)
    assert [path.name for path in tmp_path.iterdir()] == ["weights-4"]
    assert stored_tensors(tmp_path / "weights-4").keys() == weights().keys()
    index = json.loads((tmp_path / "weights-4/model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(weights()), "rank-00000.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights().values())


def test_what_killed_runs_have_left_goes(tmp_path: Path) -> None:
    for name in ("weights-7", "weights-3.123.partial", "weights-3.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_text("")
    push(DiskSync(ReadingEngine(), tmp_path), version=3)
    assert [path.name for path in tmp_path.iterdir()] == ["weights-3"]


def test_the_last_good_folder_stays_when_an_engine_refuses(tmp_path: Path) -> None:
    engine = ReadingEngine()
    sync = DiskSync(engine, tmp_path)
    push(sync, version=1)
    engine.refuse = True
    with pytest.raises(EngineError, match="refused"):
        push(sync, version=2)
    assert same(load_file(tmp_path / "weights-1/rank-00000.safetensors"), weights())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    sync = DiskSync(ReadingEngine(), tmp_path / "sync")
    (tmp_path / "sync").rmdir()
    with pytest.raises(EngineError, match=r"cannot write the weights .* No such file"):
        push(sync, version=1)
    (tmp_path / "sync").symlink_to("/proc")  # has no room
    with pytest.raises(EngineError, match="more than is free"):
        push(sync, version=1)


def test_what_no_rank_gives_is_missed(tmp_path: Path) -> None:
    engine, sync = ReadingEngine(), DiskSync(ReadingEngine(), tmp_path)
    given = {name: tensor for name, tensor in weights().items() if name != "c.weight"}
    with pytest.raises(EngineError, match=r"1 of the tensors are no rank's, for example c\.weight"):
        sync.push(NamedTensors(given.items(), NamedTensors.of(weights()).specs), version=1)
    assert (engine.updates, list(tmp_path.iterdir())) == ([], [])


def two_files(folder: Path) -> Path:
    """A folder as two ranks write it."""
    parts, files, sums = (list(weights().items())[:2], list(weights().items())[2:]), {}, {}
    folder.mkdir()
    for rank, part in enumerate(parts):
        name = f"rank-{rank:05d}.safetensors"
        sums |= weights_file.write(folder / name, dict(part), version=5)
        files |= dict.fromkeys(dict(part), name)
    write_index(folder, files, 1, {VERSION: "5", KEY: checksum_of_all(sums)})
    return folder


def test_an_engine_reads_all_files_in_the_order_of_the_index(tmp_path: Path) -> None:
    folder, received = str(two_files(tmp_path / "weights-5")), dict[str, str]()
    found = dict(read(folder, received))
    assert list(found) == sorted(weights())
    assert same(found, weights())
    assert received == {name: checksum(tensor) for name, tensor in weights().items()}
    assert version_of(folder) == "5"


def test_an_engine_refuses_files_of_several_pushes(tmp_path: Path) -> None:
    """Each by itself is what a rank has once written; a tensor in none of them is named."""
    folder = two_files(tmp_path / "weights-5")
    older = {name: tensor + 1 for name, tensor in list(weights().items())[:2]}
    weights_file.write(folder / "rank-00000.safetensors", older, version=4)
    with pytest.raises(ValueError, match=r"have together checksum .* was sent"):
        list(read(str(folder), {}))
    weights_file.write(folder / "rank-00000.safetensors", dict(list(older.items())[:1]), version=4)
    with pytest.raises(ValueError, match=r"has no b\.weight"):
        list(read(str(folder), {}))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, SharedMemorySync),
        ({"addresses": ["http://127.0.0.1:8700"]}, SharedMemorySync),
        ({"addresses": ["http://127.0.0.1:8700", "http://node7:8700"]}, DiskSync),
        ({"transport": "disk"}, DiskSync),
    ],
)
def test_auto_follows_the_addresses(tmp_path: Path, settings: dict[str, Any], kind: type) -> None:
    assert type(open_sync(section(**settings), ReadingEngine(), tmp_path)) is kind


def test_shared_memory_does_not_reach_another_machine() -> None:
    with pytest.raises(ValueError, match="does not reach addresses on other machines"):
        section(transport="shared_memory", addresses=["http://node7:8700"])
