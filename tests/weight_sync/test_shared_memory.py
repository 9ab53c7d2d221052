"""The file: written where there is room, whole, and gone afterwards, whatever the engine does with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.errors import EngineError
from megatron_r1.types import Sample
from megatron_r1.weight_sync.shared_memory import SharedMemorySync


class ReadingEngine:
    """Keeps what it was given, or refuses it."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.updates: list[tuple[Path, int, dict[str, torch.Tensor]]] = []

    def sample(self, prompts: object, **_: object) -> list[list[Sample]]:
        return []

    def update_weights(self, path: Path, version: int) -> None:
        if self.refuse:
            raise EngineError("refused")
        self.updates.append((path, version, load_file(path)))

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


def test_engine_reads_every_tensor_and_the_file_is_gone(tmp_path: Path) -> None:
    engine = ReadingEngine()
    SharedMemorySync(engine, tmp_path / "fallback", tmp_path).push(weights().items(), version=3)
    ((path, version, read),) = engine.updates
    assert version == 3
    assert path.parent == tmp_path
    assert not path.exists()
    assert read.keys() == weights().keys()
    for name, tensor in weights().items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_refused_update_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="refused"):
        SharedMemorySync(ReadingEngine(refuse=True), tmp_path / "fallback", tmp_path).push(weights().items(), version=1)
    assert not list(tmp_path.glob("*.safetensors"))


def test_fallback_when_there_is_no_shared_memory(tmp_path: Path) -> None:
    engine = ReadingEngine()
    SharedMemorySync(engine, tmp_path / "fallback", tmp_path / "absent").push(weights().items(), version=1)
    assert engine.updates[0][0].parent == tmp_path / "fallback"
