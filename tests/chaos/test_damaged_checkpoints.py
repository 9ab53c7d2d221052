"""A real run whose newest checkpoint is damaged goes on from the one before, says so, and reaches the same weights.

What can happen to which file is tried in tests/checkpoint/test_damage.py.
"""

import shutil
import signal
from pathlib import Path

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SAVED, Command, checkpoint, rows, weights


@pytest.fixture
def ended(prepared: Path, tmp_path: Path) -> Path:
    """The folder of a run of 12 steps with the checkpoints 8 and 12; beside it, its run file."""
    output = tmp_path / "run"
    shutil.copytree(prepared / "base", output)
    runs.write(tmp_path / "pretrain.toml", runs.pretrain(prepared, output))
    return output


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_run_falls_back_and_ends_with_the_same_weights(ended: Path) -> None:
    undisturbed, measured = weights(ended), rows(ended)
    damage(ended / "checkpoints/step_00000012/__0_0.distcp")
    shutil.rmtree(ended / "hf")
    with Command("pretrain", ended.with_name("pretrain.toml")) as command:
        assert command.end() == 0, command.message()
    said = (ended / "run.log").read_text()
    assert "warning: going on from step 8" in said
    assert "step_00000012 is damaged (__0_0.distcp has been altered" in said
    assert weights(ended) == undisturbed
    assert rows(ended) == measured


def test_a_run_without_a_whole_checkpoint_is_refused_by_name(ended: Path) -> None:
    damage(ended / "checkpoints/step_00000012/common.pt")
    (ended / "checkpoints/step_00000008/.metadata").unlink()
    with Command("pretrain", ended.with_name("pretrain.toml")) as command:
        assert command.end() == 2, command.message()
    assert "step_00000012 is damaged (common.pt has been altered" in command.message()
    assert "step_00000008 is damaged (.metadata is missing)" in command.message()
    assert "Traceback" not in command.message()


@pytest.mark.parametrize(
    ("sent", "options"),
    [
        (signal.SIGTERM, []),
        (signal.SIGUSR1, ["--checkpoint.asynchronous=true"]),
        (signal.SIGUSR1, ["--parallel.processes=2"]),
    ],
)
def test_a_signal_saves_between_the_scheduled_checkpoints(
    prepared: Path, tmp_path: Path, sent: signal.Signals, options: list[str]
) -> None:
    output = tmp_path / "run"
    run_file = runs.write(tmp_path / "pretrain.toml", runs.pretrain(prepared, output))
    with Command("pretrain", run_file, *options, "--checkpoint.every=1000") as command:
        command.until(lambda: (output / "metrics.jsonl").exists() and len(rows(output)) >= 2).look()
        command.process.send_signal(sent)
        assert command.end() == SAVED, command.message()
    [folder] = (output / "checkpoints").iterdir()
    assert checkpoint(output, len(rows(output)))()
    assert 2 <= int(folder.name.removeprefix("step_")) < 12
    with Command("pretrain", run_file, *options) as command:
        assert command.end() == 0, command.message()
    assert len(rows(output)) == 12
    if len(options) == 0:
        assert weights(output) == weights(prepared / "base")
