"""Throughput of models and devices whose figures are known."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_r1.model.flops import whole_config
from megatron_r1.train.throughput import Throughput, peak

V3 = Path(__file__).parents[1] / "convert/deepseek_v3.json"


@pytest.fixture
def model() -> SimpleNamespace:
    hf = json.loads(V3.read_text())
    return SimpleNamespace(hf=hf, config=whole_config(hf), chunks=[torch.nn.Linear(1, 1)])


def test_deepseek_v3_on_1024_h100(model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,297 tokens/s a GPU are 338 TFLOP/s (Megatron-Bridge), which is 34 % of 989."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    rows = 8192
    figures = Throughput(model, 1024).figures([4096] * rows, seconds=rows * 4096 / 1297 / 1024)
    assert figures["tokens_per_second"] == pytest.approx(1297 * 1024)
    assert figures["tflops"] == pytest.approx(338, abs=0.5)
    assert figures["mfu"] == pytest.approx(338 / 989, rel=2e-3)


def test_on_a_cpu_there_is_no_peak(model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(Throughput(model, 1).figures([8], 1.0)) == {"tokens_per_second", "tflops"}


def test_two_forward_passes_more_are_two_thirds_more_work(model: SimpleNamespace) -> None:
    throughput = Throughput(model, 2)
    update, scored = throughput.figures([9, 5], 3.0), throughput.figures([9, 5], 3.0, forward_passes=2)
    assert scored["tflops"] == pytest.approx(update["tflops"] * 5 / 3)
    assert scored["tokens_per_second"] == update["tokens_per_second"] == pytest.approx(14 / 3)


def test_frozen_weights_have_no_gradients_to_compute(model: SimpleNamespace) -> None:
    """Forward, and backward through the activations: two of the three products of each matrix."""
    whole = Throughput(model, 1).figures([9, 5], 3.0)
    model.chunks[0].weight.requires_grad_(False)
    assert Throughput(model, 1).figures([9, 5], 3.0)["tflops"] == pytest.approx(whole["tflops"] * 2 / 3)


@pytest.mark.parametrize(
    ("device", "bfloat16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H20", None),
        ("", None),
    ],
)
def test_peaks_by_name(device: str, bfloat16: float | None) -> None:
    assert peak(device, torch.bfloat16) == bfloat16
