"""A named file on a file system that engines elsewhere see; which transport a run has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import EngineError
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import open_sync
from tests.weight_sync.test_shared_memory import ReadingEngine, same, weights


def section(**settings: Any) -> RolloutSection:
    return RolloutSection(max_model_len=8, max_tokens=4, **settings)


def test_the_newest_file_stays(tmp_path: Path) -> None:
    engine = ReadingEngine()
    for version in (3, 4):
        DiskSync(engine, tmp_path).push(weights().items(), version)
    assert [(path.name, version) for path, version, _ in engine.updates] == [
        ("weights-3.safetensors", 3),
        ("weights-4.safetensors", 4),
    ]
    assert all(same(read, weights()) for _, _, read in engine.updates)
    assert [path.name for path in tmp_path.iterdir()] == ["weights-4.safetensors"]
    assert same(load_file(tmp_path / "weights-4.safetensors"), weights())


def test_the_last_good_file_stays_when_an_engine_refuses(tmp_path: Path) -> None:
    engine = ReadingEngine()
    sync = DiskSync(engine, tmp_path)
    sync.push(weights().items(), version=1)
    engine.refuse = True
    with pytest.raises(EngineError, match="refused"):
        sync.push(weights().items(), version=2)
    assert same(load_file(tmp_path / "weights-1.safetensors"), weights())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    sync = DiskSync(ReadingEngine(), tmp_path / "sync")
    (tmp_path / "sync").rmdir()
    with pytest.raises(EngineError, match=r"cannot write the weights .* No such file"):
        sync.push(weights().items(), version=1)
    (tmp_path / "sync").symlink_to("/proc")  # has no room
    with pytest.raises(EngineError, match="more than is free"):
        sync.push({"a": torch.ones(2)}.items(), version=1)


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
