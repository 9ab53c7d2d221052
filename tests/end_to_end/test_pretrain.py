"""Pretraining that is killed, interrupted or cut into processes reaches the numbers of the undisturbed run."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.convert import ExportConfig
from megatron_r1.convert.verbs import run_export
from tests.end_to_end import runs
from tests.end_to_end.runs import SAVED, Command, checkpoint, rows, weights


def test_killed_run_goes_on_to_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run_file = runs.write(tmp_path / "pretrain.toml", runs.pretrain(prepared, output))
    with Command("pretrain", run_file) as command:
        command.until(checkpoint(output, 4)).send(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL
    assert not checkpoint(output, 12)()
    with Command("pretrain", run_file) as command:
        assert command.end() == 0, command.message()
    assert weights(output) == weights(prepared / "base")
    assert rows(output) == rows(prepared / "base")
    assert rows(output, "evaluation") == rows(prepared / "base", "evaluation")
    assert runs.summary(output) == runs.summary(prepared / "base")


def test_the_test_is_taken_once_after_the_last_step(prepared: Path) -> None:
    """Here of the documents of the validation."""
    lines = rows(prepared / "base", "evaluation")
    assert [(line["step"], name) for line in lines for name in line if name.endswith("_loss")] == [
        (6, "validation_loss"), (12, "validation_loss"), (12, "test_loss")
    ]  # fmt: skip
    summary = runs.summary(prepared / "base")
    assert summary["test_loss"] == summary["validation_loss"] == lines[-1]["test_loss"]


def test_a_checkpoint_exports_by_itself(prepared: Path, tmp_path: Path) -> None:
    """It holds what describes the model, whether the run has ended or not; the last one is the run's own export."""
    for done in (8, 12):
        step = shutil.copytree(prepared / f"base/checkpoints/step_{done:08d}", tmp_path / f"{done}/step_{done:08d}")
        run_export(ExportConfig(source=step, output=tmp_path / f"hf_{done}"))
    ended = prepared / "base/hf"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf_8" / name).read_bytes() == (ended / name).read_bytes()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf_12", ended))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_two_processes_learn_what_one_does(prepared: Path, tmp_path: Path) -> None:
    """Stopped by SIGTERM on the way, after which it saves, and finished by one process."""
    output = tmp_path / "run"
    run_file = runs.write(tmp_path / "pretrain.toml", runs.pretrain(prepared, output))
    with Command("pretrain", run_file, "--parallel.processes=2") as command:
        command.until(checkpoint(output, 4)).look()
        command.process.send_signal(signal.SIGTERM)
        runs.interrupted_cleanly(command, SAVED)
    assert not checkpoint(output, 12)()
    with Command("pretrain", run_file) as command:
        assert command.end() == 0, command.message()
    found, expected = rows(output), rows(prepared / "base")
    assert [row["step"] for row in found] == list(range(12))
    for name in ("loss", "mtp_loss", "grad_norm", "lr"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4), name
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    tensors, others = (load_file(folder / "hf/model.safetensors") for folder in (output, prepared / "base"))
    assert max((tensors[name] - others[name]).abs().max().item() for name in tensors) < 1e-3
