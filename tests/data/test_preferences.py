"""Preference files: what is read, what is refused and where, and what is held out."""

import json
from pathlib import Path

import pytest

from megatron_r1.data.preferences import Labelled, Pair, hold_out, read_labels, read_pairs
from megatron_r1.errors import DataError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2.0}
LABEL = {"prompt": "p", "response": "r", "label": 1}


def write(path: Path, *rows: object) -> list[Path]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def test_pairs_of_all_files_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", PAIR, PAIR | {"chosen": "better"})
    second = write(tmp_path / "b.jsonl", PAIR | {"prompt": "q"})
    assert read_pairs(first + second) == [
        Pair("p", "good", "bad"),
        Pair("p", "better", "bad"),
        Pair("q", "good", "bad"),
    ]


def test_labels(tmp_path: Path) -> None:
    paths = write(tmp_path / "l.jsonl", LABEL, LABEL | {"label": 0})
    assert read_labels(paths) == [Labelled("p", "r", 1), Labelled("p", "r", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, r"line 2 has no `chosen`.*choosen"),
        (PAIR | {"rejected": "good"}, r"line 2.*same text"),
        (PAIR | {"chosen": "  "}, r"line 2: `chosen` is '  '"),
        (PAIR | {"prompt": None}, r"line 2: `prompt` is None"),
        ([1], r"line 2: expected an object"),
    ],
)
def test_bad_pairs_are_named_by_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path / "pairs.jsonl", PAIR, row))


@pytest.mark.parametrize("label", [2, "safe", None, -1])
def test_a_label_is_0_or_1(tmp_path: Path, label: object) -> None:
    with pytest.raises(DataError, match=r"line 2: `label` is"):
        read_labels(write(tmp_path / "labels.jsonl", LABEL, LABEL | {"label": label}))


def test_labels_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every label is 1"):
        read_labels(write(tmp_path / "labels.jsonl", LABEL, LABEL))


@pytest.mark.parametrize("read", [read_pairs, read_labels])
def test_an_empty_or_missing_file_is_refused(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="is empty"):
        read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="cannot read"):
        read([tmp_path / "none.jsonl"])


def test_a_prompt_is_on_one_side_only() -> None:
    rows = [Pair(f"p{n % 20}", f"c{n}", "r") for n in range(100)]
    training, heldout = hold_out(rows, lambda row: row.prompt, share=0.25, seed=0)
    assert len(heldout) == 25
    assert {row.prompt for row in heldout}.isdisjoint(row.prompt for row in training)
    assert sorted(training + heldout, key=rows.index) == rows
    assert hold_out(rows, lambda row: row.prompt, share=0.25, seed=0) == (training, heldout)
    assert hold_out(rows, lambda row: row.prompt, share=0.25, seed=1)[1] != heldout


def test_nothing_or_everything_held_out() -> None:
    rows = [Pair("p", "c", "r")] * 3
    assert hold_out(rows, lambda row: row.prompt, share=0.0, seed=0) == (rows, [])
    with pytest.raises(DataError, match=r"heldout_share 0.1 of 1 prompts is 0"):
        hold_out(rows, lambda row: row.prompt, share=0.1, seed=0)
