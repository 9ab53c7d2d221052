import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cli import main
from megatron_r1.config.evaluation import FilterConfig
from megatron_r1.config.load import validate
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.evaluate.filter import run
from tests.evaluate.run_files import KNOWN, lines, over, sampling
from tests.evaluate.scripted import Opener

ROOT = Path(__file__).parents[2]
MIXED = [
    {"problem": "What is 1 + 2?", "answer": 3, "source": "a"},
    {"problem": "what is 1+2 ?", "answer": 3, "source": "b"},
    {"problem": "What is 1 - 2?", "answer": -1},
    {"problem": "Hm?", "answer": 0},
    {"problem": f"What is {' + '.join('1' * 40)}?", "answer": 40},
]


def tree(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"output": str(output), "data": over(source), "rewards": KNOWN} | changes


def filtered(source: Path, output: Path, opener: Opener | None = None, **changes: Any) -> dict[str, Any]:
    config = validate(FilterConfig, tree(source, output, **changes), where="the test")
    return run(config, opener or Opener())


def mixed(folder: Path, rows: list[dict[str, Any]] = MIXED) -> Path:
    path = folder / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl", "summary.json")}


def test_duplicates_and_lengths_need_no_model(tmp_path: Path) -> None:
    opener = Opener()
    summary = filtered(mixed(tmp_path), tmp_path / "out", opener, length={"min_characters": 5, "max_characters": 60})
    assert lines(tmp_path / "out/kept.jsonl") == [MIXED[0], MIXED[2]]
    dropped = lines(tmp_path / "out/dropped.jsonl")
    assert [(row["reason"], row["row"]) for row in dropped] == [
        ("duplicate", MIXED[1]),
        ("too short", MIXED[3]),
        ("too long", MIXED[4]),
    ]
    assert dropped[0]["detail"].endswith("mixed.jsonl, line 1")
    assert dropped[1]["detail"] == "3 characters"
    expected = {"rows": 5, "kept": 2, "dropped": {"duplicate": 1, "too long": 1, "too short": 1}, "pass_rates": {}}
    assert summary == json.loads((tmp_path / "out/summary.json").read_text()) == expected
    assert not opener.engines


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 5 rows is kept.*'too short': 4.*dropped\.jsonl"):
        filtered(mixed(tmp_path), tmp_path / "out", length={"min_characters": 500})
    assert not (tmp_path / "out/summary.json").exists()


def test_nothing_is_dropped_unless_asked(tmp_path: Path) -> None:
    filtered(mixed(tmp_path), tmp_path / "out", deduplicate=False)
    assert lines(tmp_path / "out/kept.jsonl") == MIXED


def test_tokens_are_counted_with_the_template(tmp_path: Path, model: Path) -> None:
    filtered(mixed(tmp_path), tmp_path / "out", tokenizer=str(model), length={"max_tokens": 60})
    [_, long] = lines(tmp_path / "out/dropped.jsonl")
    assert long["reason"] == "too long"
    assert int(long["detail"].removesuffix(" tokens")) > 80


def test_rows_that_make_no_question(tmp_path: Path) -> None:
    source = mixed(tmp_path, [MIXED[0], {"problem": "", "answer": 1}, MIXED[2]])
    with pytest.raises(DataError, match=r"mixed\.jsonl, line 2"):
        filtered(source, tmp_path / "out")
    assert filtered(source, tmp_path / "out", drop_unreadable=True)["dropped"] == {"unreadable": 1}


def test_only_what_is_solved_sometimes_is_kept(tmp_path: Path, sums: Path, model: Path) -> None:
    opener = Opener()
    summary = filtered(sums, tmp_path / "out", opener, pass_rate=sampling(model, samples=16))
    kept = lines(tmp_path / "out/kept.jsonl")
    dropped = {row["row"]["id"]: row["reason"] for row in lines(tmp_path / "out/dropped.jsonl")}
    assert (dropped[0], dropped[10], dropped[11]) == ("too hard", "too easy", "not judged")
    assert {5, 6} <= {row["id"] for row in kept}
    assert all(0 < row["pass_rate"] < 1 and row["pass_rate"] * 16 % 1 == 0 for row in kept)
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)
    assert summary["kept"] + sum(summary["dropped"].values()) == 12
    assert sum(summary["pass_rates"].values()) == 11
    assert opener.asked == [4, 4, 4]
    assert opener.engines[0].sampling == [(1.0, 1.0)] * 3


def test_the_same_task_reads_what_is_kept(tmp_path: Path, sums: Path, model: Path) -> None:
    section = sampling(model)
    filtered(sums, tmp_path / "out", pass_rate=section)
    again = filtered(tmp_path / "out/kept.jsonl", tmp_path / "again", pass_rate=section | {"min": -1.0, "max": 2.0})
    assert again["kept"] == again["rows"] == len(lines(tmp_path / "out/kept.jsonl"))


def test_other_bounds_sample_nothing(tmp_path: Path, sums: Path, model: Path) -> None:
    section = sampling(model, samples=16)
    filtered(sums, tmp_path / "out", pass_rate=section)
    opener = Opener()
    summary = filtered(sums, tmp_path / "out", opener, pass_rate=section | {"min": 0.4, "max": 0.7})
    assert not opener.engines
    assert all(0.4 < row["pass_rate"] < 0.7 for row in lines(tmp_path / "out/kept.jsonl"))
    assert 0 < summary["kept"] < 9


@pytest.mark.parametrize(
    "change", [{"samples": 5}, {"seed": 1}, {"rollout": {"max_model_len": 96, "max_tokens": 40}}, {"batch": 6}]
)
def test_other_settings_sample_again(tmp_path: Path, sums: Path, model: Path, change: dict[str, Any]) -> None:
    filtered(sums, tmp_path / "out", pass_rate=sampling(model))
    opener = Opener()
    filtered(sums, tmp_path / "out", opener, pass_rate=sampling(model, **change))
    assert sum(opener.asked) == 12


def test_a_prompt_without_room_for_a_response(tmp_path: Path, model: Path) -> None:
    section = sampling(model)
    section["rollout"] |= {"max_model_len": 60}
    filtered(mixed(tmp_path, MIXED[::4]), tmp_path / "out", pass_rate=section)
    assert "no room for a response" in {row["reason"] for row in lines(tmp_path / "out/dropped.jsonl")}


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, sums: Path, model: Path, batches: int) -> None:
    section = sampling(model)
    undisturbed = filtered(sums, tmp_path / "whole", pass_rate=section)
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tree(sums, tmp_path / "out", pass_rate=section)))
    command = [sys.executable, "-m", "tests.evaluate.scripted", str(file), str(batches)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out/kept.jsonl").exists()
    opener = Opener()
    assert filtered(sums, tmp_path / "out", opener, pass_rate=section) == undisturbed
    assert len(opener.asked) == 3 - batches
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tree(mixed(tmp_path), tmp_path / "out")))
    assert main(["data", "filter", str(file), "--json", "--length.max_characters=50"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["kept"] == 3
    assert "3 of 5 rows kept" in said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"task": {"type": "reasoning_gym", "dataset": "chain_sum"}}}, "not over a data set"),
        ({"length": {"max_tokens": 5}}, "set `tokenizer`"),
        ({"pass_rate": {"min": 0.5, "max": 0.5}}, "not below max"),
        ({"rewards": {"format": {"type": "format"}}, "pass_rate": {}}, r"no reward judges.*format"),
    ],
)
def test_bad_configs(tmp_path: Path, sums: Path, model: Path, changes: dict[str, Any], message: str) -> None:
    if "pass_rate" in changes:
        changes = changes | {"pass_rate": sampling(model) | changes["pass_rate"]}
    with pytest.raises(ConfigError, match=message):
        filtered(sums, tmp_path / "out", **changes)
