"""The simulated fleet against times worked out by hand."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

TOOL = Path(__file__).parents[2] / "tools/simulate_fleet.py"
# 10 tokens/s whatever the batch, 1,000 tokens each: 100 s. Training takes 40 s.
PLAIN = ["--curve=1:10,64:640", "--lengths=constant:1000", "--engines=4", "--groups=4", "--train=40", "--steps=13"]


def simulate(folder: Path, *options: str) -> list[dict[str, Any]]:
    file = folder / "fleet.json"
    command = [sys.executable, TOOL, *PLAIN, *options, f"--json={file}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(file.read_text())
    assert len(printed.splitlines()) == 2 + len(found)
    return found


def test_step_times_and_idle_shares(tmp_path: Path) -> None:
    drawing = tmp_path / "fleet.svg"
    outcomes = simulate(tmp_path, "--sync=0", "--staleness=0,1,4", f"--svg={drawing}")
    # Generation and training take turns; then two steps share that time; then the learner is never idle.
    assert [one["step_seconds"] for one in outcomes] == pytest.approx([140, 70, 40])
    assert [one["engine_idle"] for one in outcomes] == pytest.approx([40 / 140, 0, 0], abs=1e-9)
    assert [one["learner_idle"] for one in outcomes] == pytest.approx([100 / 140, 30 / 70, 0], abs=1e-9)
    assert [one["sequences"] for one in outcomes] == pytest.approx([16 * 100 / time for time in (140, 70, 40)])
    assert [one["tokens_per_second"] for one in outcomes] == pytest.approx([64_000 / time for time in (140, 70, 40)])
    assert [list(map(int, one["histogram"])) for one in outcomes] == [[0], [0, 1], [0, 1, 2, 3, 4]]
    assert outcomes[0]["requests"] == 13 * 4 * 16
    texts = [element.text for element in ElementTree.parse(drawing).iter() if element.text]
    assert {"staleness 0", "140 s a step", "28.6%", "71.4%"} <= set(texts)


def test_engines_stand_still_while_weights_go_out(tmp_path: Path) -> None:
    (outcome,) = simulate(tmp_path, "--sync=10", "--staleness=0", "--slots=8")
    # 16 sequences in 8 slots: twice 100 s; then 40 s of training and 10 s of sending.
    assert outcome["step_seconds"] == pytest.approx(250)
    assert outcome["learner_idle"] == pytest.approx(200 / 250)


@pytest.mark.parametrize(
    ("name", "text"),
    [("lengths.csv", "question,length\na,1000\nb,1000\n"), ("lengths.jsonl", '{"length": 1000}\n1000\n')],
)
def test_lengths_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (outcome,) = simulate(tmp_path, f"--lengths={tmp_path / name}", "--sync=0", "--staleness=0", "--max-tokens=500")
    assert outcome["step_seconds"] == pytest.approx(90)


def test_long_tails_over_sizes_and_policies(tmp_path: Path) -> None:
    tail = ["--lengths=lognormal:300:1:0.5", "--staleness=1", "--slots=32"]
    small, large = simulate(tmp_path, *tail, "--sizes=4,8")
    assert (small["engines"], large["engines"]) == (4, 8)
    assert large["tokens_per_second"] > 1.2 * small["tokens_per_second"]
    (drop,) = simulate(tmp_path, *tail, "--late=drop")
    (keep,) = simulate(tmp_path, *tail, "--late=keep")
    assert drop["dropped"] > 0 == small["dropped"] == keep["dropped"]
    assert max(map(int, drop["histogram"])) <= 1 < max(map(int, keep["histogram"]))
    assert max(drop["step_seconds"], keep["step_seconds"]) < small["step_seconds"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--lengths=/nonexistent", "cannot read /nonexistent: No such file or directory"),
        ("--lengths=lognormal:5000", "is not constant:N, lognormal:MEDIAN:SIGMA:CORRELATION"),
        ("--engines=-1", "-1 is not 1 or more"),
        ("--engines=many", "'many' is no number"),
        ("--sizes=4,0", "0 is not 1 or more"),
        ("--staleness=-1", "-1 is not 0 or more"),
        ("--curve=1:10,64", "is not sequences:tokens/s"),
        ("--train=nan", "nan is not 0 or more"),
    ],
)
def test_what_cannot_be_simulated(
    option: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TOOL))["parser"]().parse_args([option])
    told = capsys.readouterr().err
    assert f"argument {option.partition('=')[0]}: " in told
    assert said in told
