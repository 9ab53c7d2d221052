"""Two nameless files where there is room; an engine takes what was sent or nothing at all."""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.errors import DataError, EngineError
from megatron_r1.rollout.checksum import BLOCK, BLOCKS, Summed, checksum
from megatron_r1.rollout.weights_files import read, version_of
from megatron_r1.types import Sample
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync


class ReadingEngine:
    """Keeps a copy of what it was given, as an engine does, or refuses it."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.updates: list[tuple[Path, int, dict[str, torch.Tensor]]] = []

    def sample(self, prompts: object, **_: object) -> list[list[Sample]]:
        return []

    def update_weights(self, path: Path, version: int) -> None:
        if self.refuse:
            raise EngineError("refused")
        files = path.glob("*.safetensors") if path.is_dir() else [path]
        found = {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}
        self.updates.append((path, version, found))

    def close(self) -> None:
        pass


def weights() -> dict[str, torch.Tensor]:
    matrix = torch.arange(12.0).reshape(3, 4)
    gate, up = torch.arange(8.0).chunk(2)  # one memory, as the trainer's fused layers
    return {
        "a.weight": matrix.bfloat16(),
        "b.weight": matrix.T,
        "c.weight": torch.nn.Parameter(matrix),
        "tied.weight": matrix,
        "gate.weight": gate,
        "up.weight": up,
    }


def same(read: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    same_types = all(read[name].dtype == tensor.dtype for name, tensor in sent.items())
    return read.keys() == sent.keys() and same_types and all(torch.equal(read[name], sent[name]) for name in sent)


def test_engine_reads_every_tensor_of_every_push(tmp_path: Path) -> None:
    engine, shared = ReadingEngine(), tmp_path / "shared"
    shared.mkdir()
    sync = SharedMemorySync(engine, tmp_path / "fallback", shared)
    pushed = [{name: tensor + factor for name, tensor in weights().items()} for factor in range(5)]
    for version, tensors in enumerate(pushed):
        sync.push(NamedTensors.of(tensors), version)
    assert [version for _, version, _ in engine.updates] == [0, 1, 2, 3, 4]
    assert all(same(read, sent) for (_, _, read), sent in zip(engine.updates, pushed, strict=True))
    paths = [path for path, _, _ in engine.updates]
    assert paths[0] == paths[2] == paths[4] != paths[1] == paths[3], "two files take turns"
    assert same(load_file(paths[3]), pushed[3]), "the one before is whole while the next is loaded"
    assert not list(shared.iterdir()), "no name that a killed run would leave"
    assert not list((tmp_path / "fallback").iterdir())
    sync.close()
    assert not paths[0].exists()


def test_what_is_announced_and_not_given_is_missed(tmp_path: Path) -> None:
    """Else an engine would take what stood there two pushes ago."""
    engine, whole = ReadingEngine(), weights()
    sync = SharedMemorySync(engine, tmp_path, tmp_path)
    for version in range(2):
        sync.push(NamedTensors.of(whole), version)
    given = {name: tensor for name, tensor in whole.items() if name != "c.weight"}
    with pytest.raises(DataError, match=r"1 of the weights .* c\.weight"):
        sync.push(NamedTensors(given.items(), NamedTensors.of(whole).specs), 2)
    with pytest.raises(DataError, match=r"c\.weight is torch\.float32"):
        sync.push(NamedTensors(whole.items(), NamedTensors.of(given).specs), 3)
    assert [version for _, version, _ in engine.updates] == [0, 1]


def test_a_smaller_model_after_a_larger_one(tmp_path: Path) -> None:
    engine = ReadingEngine()
    sync = SharedMemorySync(engine, tmp_path, tmp_path)
    small = {"a.weight": torch.ones(2)}
    for version, tensors in enumerate([weights(), weights(), small]):
        sync.push(NamedTensors.of(tensors), version)
    assert same(engine.updates[2][2], small)


def test_a_refused_update_can_be_followed_by_another(tmp_path: Path) -> None:
    engine = ReadingEngine(refuse=True)
    sync = SharedMemorySync(engine, tmp_path / "fallback", tmp_path)
    with pytest.raises(EngineError, match="refused"):
        sync.push(NamedTensors.of(weights()), version=1)
    engine.refuse = False
    sync.push(NamedTensors.of(weights()), version=2)
    assert same(engine.updates[0][2], weights())


def test_fallback_when_there_is_no_shared_memory(tmp_path: Path) -> None:
    engine = ReadingEngine()
    sync = SharedMemorySync(engine, tmp_path / "fallback", tmp_path / "absent")
    sync.push(NamedTensors.of(weights()), version=1)
    assert engine.updates[0][0].readlink().is_relative_to(tmp_path / "fallback")


def test_no_room_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(EngineError, match="three times their size"):
        SharedMemorySync(ReadingEngine(), tmp_path, tmp_path).push(NamedTensors.of(weights()), version=1)


class ReceivingEngine(ReadingEngine):
    """Reads as vLLM's worker does, after a byte of one tensor has changed on the way."""

    def __init__(self, damaged: str | None = None) -> None:
        super().__init__()
        self.damaged = damaged
        self.received: dict[str, str] = {}

    def update_weights(self, path: Path, version: int) -> None:
        if self.damaged:
            content = bytearray(path.read_bytes())
            (header,) = struct.unpack_from("<Q", content)
            _, end = json.loads(content[8 : 8 + header])[self.damaged]["data_offsets"]
            content[8 + header + end - 1] ^= 1
            path.write_bytes(content)
        self.updates.append((path, version, dict(read(str(path), self.received))))


def test_engine_takes_what_was_sent(tmp_path: Path) -> None:
    engine = ReceivingEngine()
    SharedMemorySync(engine, tmp_path, tmp_path).push(NamedTensors.of(weights()), version=0)
    assert engine.updates[0][2].keys() == weights().keys()
    assert engine.received == {name: checksum(tensor) for name, tensor in weights().items()}
    assert version_of(str(engine.updates[0][0])) == "0"


@pytest.mark.parametrize("name", ["a.weight", "up.weight"])
def test_engine_refuses_what_changed_on_the_way(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} in .* was sent"):
        SharedMemorySync(ReceivingEngine(damaged=name), tmp_path, tmp_path).push(NamedTensors.of(weights()), version=0)


def test_checksum_sees_content_shape_and_type() -> None:
    ones = torch.ones(6)
    others = [
        ones.reshape(2, 3),
        ones.view(torch.int32),
        torch.cat([torch.ones(5), torch.ones(1).nextafter(torch.tensor(2.0))]),
    ]
    assert len({checksum(tensor) for tensor in [ones, *others]}) == 4
    assert checksum(torch.ones(2, 6)[1]) == checksum(ones)
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1 << 14, 4), (1 << 14, 5), (1 << 18,)])
def test_checksum_is_that_of_what_the_memory_holds_now(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    summed = Summed(tensor)
    assert summed.checksum() == checksum(torch.zeros(shape))
    tensor.copy_(torch.randn(shape))
    assert summed.checksum() == checksum(tensor.clone())
    assert (summed.checksum() != checksum(torch.zeros(shape))) == bool(tensor.numel())


def test_checksum_of_a_large_tensor_sees_every_lost_stretch() -> None:
    """Of four megabytes: each stretch of a gap's length, and the last byte."""
    whole = torch.randint(0, 255, (1 << 22,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gap = -(-(len(whole) - BLOCK) // (BLOCKS - 1))
    starts = [*range(0, len(whole) - gap, 99_991), len(whole) - 1]
    for start in starts:
        changed = whole.clone()
        changed[start : start + gap] = 255
        assert checksum(changed) != checksum(whole), start
