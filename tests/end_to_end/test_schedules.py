"""DeepSeek-V3's schedules in a run of 12 steps, killed on the way; then the model goes on with a longer context."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.end_to_end import runs
from tests.end_to_end.runs import Command, checkpoint, rows, weights

LENGTH = 64
BATCHES = [2, 2, 2, 2, 2, 4, 4, 4, 6, 6, 6, 6]
"""20 rows in two equal parts at 2 and 4 rows a step, then 6."""
BEFORE = [sum(BATCHES[:step]) * LENGTH for step in range(12)]


def scheduled(prepared: Path, output: Path) -> dict[str, Any]:
    tree = runs.pretrain(prepared, output) | {"tokens": sum(BATCHES) * LENGTH, "batch": 6}
    tree["batch_ramp"] = {"start": 2, "tokens": 20 * LENGTH}
    tree["model"]["mtp_loss_coef"] = [{"value": 0.3, "until_tokens": 640}, {"value": 0.1}]
    tree["model"]["bias_update_rate"] = [{"value": 1e-3, "until_tokens": 1000}, {"value": 0.0}]
    phases = [
        {"until_tokens": 20 * LENGTH},
        {"schedule": "linear", "lr": 1e-3, "until_tokens": 34 * LENGTH},
        {"until_tokens": 40 * LENGTH},
        {"lr": 5e-4},
    ]
    tree["optim"] = {"lr": 5e-3, "warmup_steps": 3, "phases": phases}
    del tree["steps"]
    return tree


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scheduled")
    with Command("pretrain", runs.write(folder / "run.toml", scheduled(prepared, folder / "run"))) as command:
        assert command.end() == 0, command.message()
    return folder / "run"


def test_every_step_has_its_rate_and_its_batch(undisturbed: Path) -> None:
    """Rows 0 to 20 at 5e-3 behind a warm-up of 3 steps; step 8 takes rows 22 to 28 of the decay's 20 to 34."""
    found = [row["lr"] for row in rows(undisturbed)]
    expected = [5e-3 / 3, 1e-2 / 3, *[5e-3] * 6, 5e-3 - 4e-3 * 8 / 14, 1e-3, 1e-3, 5e-4]
    assert found == pytest.approx(expected, rel=1e-6)
    assert json.loads((undisturbed / "summary.json").read_text())["tokens"] == sum(BATCHES) * LENGTH


def test_the_bias_moves_until_its_tokens(undisturbed: Path) -> None:
    moves = sum(before < 1000 for before in BEFORE)
    biases = [value for name, value in load_file(undisturbed / "hf/model.safetensors").items() if "correction" in name]
    steps = torch.cat(biases) / 1e-3
    assert moves == 7
    assert 0 < steps.abs().max() <= moves + 1e-3
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_a_killed_run_goes_on_in_its_schedules(prepared: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run_file = runs.write(tmp_path / "run.toml", scheduled(prepared, output))
    with Command("pretrain", run_file) as command:
        command.until(checkpoint(output, 4)).send(signal.SIGKILL)
        command.end()
    assert not checkpoint(output, 12)()
    with Command("pretrain", run_file) as command:
        assert command.end() == 0, command.message()
    assert weights(output) == weights(undisturbed)
    assert rows(output) == rows(undisturbed)


def test_another_ramp_is_refused(prepared: Path, undisturbed: Path) -> None:
    run_file = runs.write(undisturbed.with_name("other.toml"), scheduled(prepared, undisturbed))
    with Command("pretrain", run_file, "--batch_ramp.tokens=640") as command:
        assert command.end() == 2
    assert "batch_ramp.tokens = 1280" in command.message()


def test_the_model_goes_on_with_a_longer_context(prepared: Path, undisturbed: Path, tmp_path: Path) -> None:
    """From 512 tokens, which is twice 256, to 1024, on rows of 600, which the model could not be fed before."""
    tree = runs.pretrain(prepared, tmp_path / "longer") | {"steps": 2, "batch": 2}
    tree["model"] |= {"path": str(undisturbed / "hf"), "load_weights": True}
    tree["corpus"] |= {"sequence_length": 600}
    plain = runs.write(tmp_path / "plain.toml", tree)
    tree["model"]["context"] = {"max_position_embeddings": 1024, "factor": 4.0}
    with Command("pretrain", plain) as command:
        assert command.end() == 2
        assert "exceed max_position_embeddings 512" in command.message()
    with Command("pretrain", runs.write(tmp_path / "run.toml", tree)) as command:
        assert command.end() == 0, command.message()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "longer/hf", dtype=torch.float32)
    assert (model.config.max_position_embeddings, model.config.rope_parameters["factor"]) == (1024, 4.0)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 256
    longer, before = (load_file(folder / "hf/model.safetensors") for folder in (tmp_path / "longer", undisturbed))
    assert longer.keys() == before.keys()
