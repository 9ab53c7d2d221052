"""The comparison on two runs written by hand, and the kill on a small program of two processes."""

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.runs import PretrainConfig
from tools import kill_and_resume

RUN_FILE = Path(__file__).parents[2] / "examples/python_library/pretrain.toml"
PROGRAM = """
import json, pathlib, subprocess, sys, time
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
(folder / "heartbeats").mkdir()
(folder / "checkpoints/step_00000002").mkdir(parents=True)
for number, rank in enumerate(ranks):
    (folder / f"heartbeats/rank_{number}.json").write_text(json.dumps({"pid": rank.pid}))
with (folder / "metrics.jsonl").open("w") as journal:
    for step in range(steps):
        journal.write(json.dumps({"kind": "step", "step": step}) + "\\n")
        journal.flush()
        time.sleep(0.02)
code = ranks[1].wait() if steps > 3 else 0
ranks[0].kill()
print("rank 1 was ended by", -code)
sys.exit(7)
"""


def step(number: int, elapsed: float) -> dict[str, Any]:
    times = {"seconds": elapsed, "seconds/update": elapsed, "tokens_per_second": 1 / elapsed}
    return {"kind": "step", "step": number, "elapsed": elapsed, **times, "loss": 8.0 - number}


def evaluation(number: int, elapsed: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": number, "elapsed": elapsed, "validation_loss": 9.0 - number}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Six steps, a checkpoint after each second; killed after five, gone on from the fourth."""
    seconds = {"undisturbed": [10, 20, 30, 40, 50, 60], "killed": [11, 22, 33, 44, 58, 69]}
    for name, ends in seconds.items():
        run = tmp_path / name
        for file in ("hf/model.safetensors", "checkpoints/step_00000006/__0_0.distcp"):
            (run / file).parent.mkdir(parents=True)
            (run / file).write_bytes(b"weights")
        write_rows(run / "metrics.jsonl", [*(step(i, end) for i, end in enumerate(ends)), evaluation(6, ends[-1])])
        figures = {"parameters": 1234, "tokens": 5678, "seconds_total": float(ends[-1])}
        (run / "summary.json").write_text(json.dumps(figures))
    write_rows(tmp_path / "before_kill.jsonl", [step(i, 11.0 * (i + 1)) for i in range(5)])
    kill = {"rank": 1, "exit_code": 137, "said": [], "went_on_from": 4}
    (tmp_path / "kill.json").write_text(json.dumps(kill))
    return tmp_path


def test_runs_that_are_the_same(output: Path) -> None:
    found = kill_and_resume.compared(output)
    assert found["same_weights"]
    assert found["same_checkpoint"]
    assert found["same_metrics"]
    assert found["same_before_kill"]
    assert found["kill"]["steps_done"] == 5
    assert found["undisturbed"]["minutes"] == pytest.approx(1.0)
    assert found["killed"]["minutes"] == pytest.approx((69 + 11) / 60)  # the fifth step was done twice
    printed = kill_and_resume.table(found)
    assert "killed after 5 steps; the run went on from the checkpoint after 4" in printed
    assert "| validation loss after 6 steps | 3.0000 | 3.0000 |" in printed
    assert "not the same" not in printed


@pytest.mark.parametrize(
    ("file", "figure"),
    [
        ("hf/model.safetensors", "same_weights"),
        ("checkpoints/step_00000006/__0_0.distcp", "same_checkpoint"),
        ("metrics.jsonl", "same_metrics"),
    ],
)
def test_one_digit_of_difference_is_seen(output: Path, file: str, figure: str) -> None:
    changed = output / "killed" / file
    changed.write_bytes(changed.read_bytes().replace(b"weights", b"weighty").replace(b'"loss": 3.0', b'"loss": 3.1'))
    found = kill_and_resume.compared(output)
    assert not found[figure]
    assert sum(not found[name] for name in found if name.startswith("same")) == 1
    assert "not the same" in kill_and_resume.table(found)


def test_a_step_that_is_missing_is_seen(output: Path) -> None:
    rows = kill_and_resume.read(output / "killed/metrics.jsonl")
    write_rows(output / "killed/metrics.jsonl", rows[:5] + rows[6:])
    assert not kill_and_resume.compared(output)["same_metrics"]


def test_the_figure_is_an_image_and_always_the_same(output: Path) -> None:
    found = kill_and_resume.compared(output)
    for name in ("a.svg", "b.svg"):
        kill_and_resume.draw(output, found, output / name)
    assert (output / "a.svg").read_bytes() == (output / "b.svg").read_bytes()
    assert "killed after 5 steps" in "".join(ET.parse(output / "a.svg").getroot().itertext())


def launch(folder: Path, steps: int) -> "subprocess.Popen[bytes]":
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, folder, str(steps)], stdout=log)


def test_one_process_is_killed_and_only_at_its_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    done = kill_and_resume.killed(launch(folder, 6), folder, at=4, rank=1)
    assert done == {"rank": 1, "exit_code": 7, "said": [f"rank 1 was ended by {signal.SIGKILL}"], "went_on_from": 2}
    assert kill_and_resume.last_step(folder / "metrics.jsonl") == 5


def test_a_run_that_ends_before_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(RuntimeError, match="has ended before step 4"):
        kill_and_resume.killed(launch(folder, 3), folder, at=4, rank=1)


def test_the_middle_lies_half_way_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RUN_FILE.parents[2])
    config = load(RUN_FILE, ["--steps=1200", "--checkpoint.every=100"], PretrainConfig)
    assert kill_and_resume.middle(config) == 650
