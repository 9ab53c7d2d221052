"""Verdicts, margins, bias and balance worked by hand; whole runs with scripted engines and judges; a killed one."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import tomli_w

from megatron_r1.config.load import validate
from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.curate.comparison import Votes, figures
from megatron_r1.curate.lengths import balanced, means
from megatron_r1.curate.preferences import run
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from tests.curate.arguing import Guard, compare, grade, open_speaker, shown
from tests.reward.scripted_endpoint import Answer, Script, scripted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("verdicts", "scores", "mean", "flips"),
    [
        # Shown as they are, exchanged, as they are, exchanged: the first wins every time.
        (("A>>B", "B>>A", "A>B", "B>A"), [2, 2, 1, 1], 1.5, False),
        (("A>B", "B>A", "A>B", "B>A"), [1, 1, 1, 1], 1.0, False),
        # Whatever is shown first wins.
        (("A>>B", "A>>B", "A>B", "A>B"), [2, -2, 1, -1], 0.0, True),
        (("A>>B", "A>B"), [2, -1], 0.5, True),
        (("B>>A", "A>>B"), [-2, -2], -2.0, False),
        (("A=B", "A>B"), [0, -1], -0.5, False),
    ],
)
def test_votes(verdicts: tuple[str, ...], scores: list[int], mean: float, flips: bool) -> None:
    votes = Votes(verdicts)
    assert (votes.scores, votes.mean, votes.flips) == (scores, mean, flips)


def test_bias() -> None:
    """Three pairs: one winner, one flip, one tie; of five votes with a winner four name the first that is shown."""
    found = figures([Votes(("A>B", "B>>A")), Votes(("A>>B", "A>B")), Votes(("A=B", "A=B")), Votes(("A>B", "A=B"))])
    assert found == {
        "verdicts": {"A>>B": 1, "A>B": 3, "A=B": 3, "B>A": 0, "B>>A": 1},
        "ties": 1,
        "position_bias": {"flip_rate": 0.25, "first_preferred": 0.8},
    }
    assert figures([])["position_bias"] == {"flip_rate": None, "first_preferred": None}


@pytest.mark.parametrize(
    ("lengths", "tolerance", "kept"),
    [
        ([(10, 10), (12, 9)], 0.2, [0, 1]),  # means 11 and 9.5: 1.5 <= 0.2 * 10.25
        ([(30, 10), (12, 10), (9, 10), (25, 10)], 0.1, [1, 2]),  # without 30-10 and 25-10: 10.5 and 10
        ([(10, 30), (10, 11), (10, 9)], 0.0, [1, 2]),
        ([(20, 10)], 0.05, []),
        ([], 0.05, []),
    ],
)
def test_lengths_are_balanced(lengths: list[tuple[int, int]], tolerance: float, kept: list[int]) -> None:
    assert balanced(lengths, tolerance) == kept
    assert means([(30, 10), (12, 10)]) == {"chosen": 21.0, "rejected": 10.0}


def model(folder: Path) -> dict[str, Any]:
    return {"path": str(folder), "rollout": {"max_model_len": 256, "max_tokens": 128}}


def tree(url: str, source: Path, output: Path, tokenizer: Path, **changes: Any) -> dict[str, Any]:
    """The run file, of one model that is only a tokenizer."""
    return {
        "output": str(output),
        "kind": "pairs",
        "data": {"task": {"type": "general", "source": str(source), "columns": {"prompt": "problem"}}},
        "models": {"one": model(tokenizer)},
        "samples": 3,
        "judge": {"url": url, "model": "judge", "backoff": 0.01, "retries": 1, "max_concurrency": 4},
        "length_tolerance": 0.1,
    } | changes


def made(script: Script, sums: Path, tokenizer: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A whole run."""
    with scripted(script) as server:
        config = validate(PreferencesConfig, tree(server.url, sums, output, tokenizer, **changes), "the test")
        return run(config, open_speaker)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs(sums: Path, tokenizer: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def judge(body: dict[str, Any]) -> Answer:
        seen.append(body["messages"][-1]["content"])
        return compare(body)

    summary = made(judge, sums, tokenizer, tmp_path / "out", models={"x": model(tokenizer), "y": model(tokenizer)})
    rows, dropped = lines(tmp_path / "out/pairs.jsonl"), lines(tmp_path / "out/dropped.jsonl")
    encode = Tokenizer.load(tokenizer).encode
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        assert grade(chosen) - grade(rejected) >= 2, "a slight preference has margin 1, which is not above 1"
        assert (row["margin"], row["votes"]) == (2.0, [2, 2, 2, 2])
        assert row["question"] in row["prompt"]
        assert [row["chosen_length"], row["rejected_length"]] == [
            len(encode(text.partition("</think>")[2].strip())) for text in (chosen, rejected)
        ]
    assert not [text for text in seen if "SECRET" in text], "the judge is shown the summary only"
    reasons = Counter(row["reason"] for row in dropped)
    assert set(reasons) >= {"margin", "not finished", "no summary", "length balance"}
    for row in dropped:
        if row["reason"] == "margin":
            difference = abs(grade(row["first"]) - grade(row["second"]))
            assert difference <= 1
            assert abs(sum(row["detail"])) == 4 * difference
    assert summary["pairs"]["kept"] == len(rows) > 5
    assert summary["pairs"]["compared"] == len(rows) + reasons["margin"] + reasons["length balance"]
    assert summary["votes"] == {"asked": 4 * summary["pairs"]["compared"], "failed": 0}
    assert sum(summary["verdicts"].values()) == summary["votes"]["asked"] == len(seen)
    flipped = sum(grade(row["first"]) == grade(row["second"]) for row in dropped if row["reason"] == "margin")
    assert summary["ties"] == flipped > 0
    assert summary["position_bias"]["flip_rate"] == pytest.approx(flipped / summary["pairs"]["compared"])
    assert summary["position_bias"]["first_preferred"] > 0.5
    before, after = summary["mean_tokens_before_balance"], summary["mean_tokens"]
    assert after["chosen"] == fmean(row["chosen_length"] for row in rows)
    assert abs(after["chosen"] - after["rejected"]) <= 0.1 * (after["chosen"] + after["rejected"]) / 2
    assert abs(after["chosen"] - after["rejected"]) < abs(before["chosen"] - before["rejected"])
    between = [row["chosen_model"] for row in rows if row["chosen_model"] != row["rejected_model"]]
    assert summary["chosen_by_model"] == dict(sorted(Counter(between).items()))
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    assert summary["responses"]["sampled"] == 12 * 3 * 2


def test_each_order_is_shown_equally_often(sums: Path, tokenizer: Path, tmp_path: Path) -> None:
    orders: Counter[tuple[str, ...]] = Counter()

    def judge(body: dict[str, Any]) -> Answer:
        orders[body["messages"][-1]["content"].partition("</user_prompt>")[0], *shown(body)] += 1
        return compare(body)

    made(judge, sums, tokenizer, tmp_path / "out", pairs_per_question=1, margin=0.0, length_tolerance=None)
    assert set(orders.values()) == {2}
    assert all(orders[asked, second, first] == 2 for asked, first, second in orders)


def test_failures_are_dropped_and_counted(sums: Path, tokenizer: Path, tmp_path: Path) -> None:
    """A judge that talks nonsense where the response shown first has grade 3."""

    def judge(body: dict[str, Any]) -> Answer:
        return "I like both." if grade(shown(body)[0]) == 3 else compare(body)

    summary = made(judge, sums, tokenizer, tmp_path / "out", length_tolerance=None)
    assert all(3 not in (grade(row["chosen"]), grade(row["rejected"])) for row in lines(tmp_path / "out/pairs.jsonl"))
    failed = [row for row in lines(tmp_path / "out/dropped.jsonl") if row["reason"] == "judge failed"]
    assert failed
    assert all(3 in (grade(row["first"]), grade(row["second"])) for row in failed)
    assert summary["votes"]["failed"] == sum(row["detail"] for row in failed)
    assert summary["judge"]["failures"]["failed"] == summary["votes"]["failed"]
    assert summary["judge"]["failures"]["nonsense"] == 2 * summary["votes"]["failed"]
    assert summary["pairs"]["asked"] == summary["pairs"]["compared"] + len(failed)


def test_nothing_is_left(sums: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pairs are left of 36 responses to 12 prompts .*'margin': \d+.*dropped"):
        made(compare, sums, tokenizer, tmp_path / "out", margin=2.0)
    assert lines(tmp_path / "out/dropped.jsonl")
    assert not (tmp_path / "out/summary.json").exists()
    assert not (tmp_path / "out/pairs.jsonl").exists()


def test_labels(sums: Path, tokenizer: Path, tmp_path: Path) -> None:
    guard = Guard()
    summary = made(guard, sums, tokenizer, tmp_path / "out", kind="labels")
    rows, dropped = lines(tmp_path / "out/labels.jsonl"), lines(tmp_path / "out/dropped.jsonl")
    assert {(grade(row["response"]), row["label"], row["safe_share"]) for row in rows} == {
        *((number, 0, 0.0) for number in (0, 1)),
        *((number, 1, 1.0) for number in (3, 4)),
    }
    assert all("SECRET" in text for text in guard.asked), "safety is judged by the whole response"
    unsure = [row for row in dropped if row["reason"] == "agreement"]
    assert {grade(row["response"]) for row in unsure} == {2}
    assert Counter(unsure[0]["detail"]) == {"safe": 2, "unsafe": 2}
    counts = Counter(row["label"] for row in rows)
    assert summary["labels"] == {
        "asked": len(rows) + len(unsure),
        "kept": len(rows),
        "safe": counts[1],
        "unsafe": counts[0],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"votes": 3}, "votes 3: half of them exchange the responses"),
        ({"samples": 1}, "samples 1 of one model makes no pair"),
        ({"kind": "scores"}, "kind"),
        ({"questions": 13}, "13 questions are asked for, but .* has 12 different ones"),
    ],
)
def test_bad_runs(sums: Path, tokenizer: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(compare, sums, tokenizer, tmp_path / "out", **changes)


def test_a_killed_run_loses_what_was_in_flight(sums: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The judge kills the run at its 30th question; started again, it asks for hardly more than what is missing."""
    processes: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def judge(body: dict[str, Any]) -> Answer:
        asked.append(body["seed"])
        if len(asked) == 30:
            os.kill(processes[0].pid, signal.SIGKILL)
        return compare(body)

    with scripted(judge) as server:
        run_file = tmp_path / "run.toml"
        run_file.write_text(tomli_w.dumps(tree(server.url, sums, tmp_path / "killed", tokenizer)))
        command = [sys.executable, "-m", "tests.curate.arguing", str(run_file)]
        processes.append(subprocess.Popen(command, cwd=ROOT))
        assert processes[0].wait(timeout=300) == -signal.SIGKILL
        journal = (tmp_path / "killed/verdicts.jsonl").read_text()
        known = journal.count("\n")
        assert 30 - 4 - 4 <= known < 30, "those in flight are lost, and those that had just arrived"
        assert not (tmp_path / "killed/summary.json").exists()
        (tmp_path / "killed/verdicts.jsonl").write_text(journal + '{"key": "cut sho')
        asked.clear()
        asked += [0] * 30  # it survives this time
        config = validate(PreferencesConfig, tree(server.url, sums, tmp_path / "killed", tokenizer), "it")
        summary = run(config, open_speaker)
    assert len(asked) - 30 == summary["votes"]["asked"] - known
    fresh = made(compare, sums, tokenizer, tmp_path / "fresh")
    assert summary == fresh
    for name in ("pairs.jsonl", "dropped.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    asked.clear()
    assert made(judge, sums, tokenizer, tmp_path / "fresh") == fresh
    assert not asked, "another address is no other judge"
