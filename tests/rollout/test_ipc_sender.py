"""Where the buffer lies that engines open, and where all else: torch's settings of memory during a push by CUDA IPC."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_r1.rollout import ipc_sender
from tests.rollout import on_cpu

SETTINGS = torch._C._accelerator_getAllocatorSettings


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those that a learner has."""
    before = SETTINGS()
    torch._C._accelerator_setAllocatorSettings(request.param)
    yield request.param
    torch._C._accelerator_setAllocatorSettings(before)


class Client:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.tensors: list[str] = []

    def update_weights(self, info: dict[str, Any]) -> None:
        self.tensors += info["names"]


class Noting(on_cpu.Torch):
    """torch that notes the settings under which memory of the GPU is asked for."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def empty(self, *shape: Any, device: object = None, **options: Any) -> torch.Tensor:
        if device == "cuda":
            self.noted.append(SETTINGS())
        return on_cpu.empty(*shape, device=device, **options)


@pytest.mark.parametrize(
    ("settings", "of_buffer"),
    [
        ("expandable_segments:True", "expandable_segments:False"),
        ("max_split_size_mb:512,expandable_segments:True", "max_split_size_mb:512,expandable_segments:False"),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
        ("", ""),
    ],
    indirect=["settings"],
)
def test_only_the_buffer_lies_outside_of_expandable_segments(
    settings: str, of_buffer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu.install(monkeypatch.setattr)
    noting, client, of_tensors = Noting(), Client(), []
    monkeypatch.setattr(on_cpu.packed_tensor, "torch", noting)
    monkeypatch.setattr(ipc_sender, "torch", on_cpu.Torch())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            of_tensors.append(SETTINGS())
            yield f"tensor {number}", torch.ones(16)

    source: Any = tensors()
    sender = ipc_sender.IpcFromFirstRank(client=client, source=source, packed=True, packed_buffer_size_bytes=128)
    sender._send_packed(source)
    assert client.tensors == [f"tensor {number}" for number in range(4)]
    assert noting.noted == [of_buffer]
    assert of_tensors == [settings] * 4
    assert SETTINGS() == settings


@pytest.mark.parametrize("settings", ["expandable_segments:True"], indirect=True)
def test_settings_come_back_after_an_error(settings: str) -> None:
    with pytest.raises(RuntimeError), ipc_sender.openable_memory():
        raise RuntimeError
    assert SETTINGS() == settings
