import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_r1.data.corpus import generate
from megatron_r1.data.questions import heldout, texts
from megatron_r1.errors import ConfigError
from tests.data.small_corpus import HELDOUT, TASK, generate_config

# Three one-digit terms make 4,000 questions, so without the exclusion the overlap would be certain.
NARROW = {**TASK, "options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}}


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_heldout_questions_never_appear(tmp_path: Path) -> None:
    section = HELDOUT.model_copy(update={"task": NARROW})
    banned = texts(heldout(section, 400))
    for asked, expected in ((400, 0), (0, 1)):
        generate(generate_config(tmp_path, task=NARROW, heldout=section, heldout_questions=asked))
        everything = (tmp_path / "train.jsonl").read_text() + (tmp_path / "validation.jsonl").read_text()
        found = sum(f"{text} Assistant:" in everything for text in banned)
        assert (found > 0) == expected


def test_shares_and_summary(tmp_path: Path) -> None:
    summary = generate(generate_config(tmp_path, quality={"careful": 3, "slip": 1, "bare": 0}))
    train = rows(tmp_path / "train.jsonl")
    counts = Counter(row["style"] for row in train)
    assert set(counts) == {"careful", "slip"}
    assert 0.7 < counts["careful"] / len(train) < 0.8
    assert summary["train"]["documents"] == len(train) == 1500
    assert summary["train"]["styles"] == counts
    assert summary["train"]["characters"] == sum(len(row["text"]) for row in train)
    assert len(rows(tmp_path / "validation.jsonl")) == 50
    assert summary["heldout_questions"] == 300
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_same_seed_same_files_and_splits_differ(corpus: Path, tmp_path: Path) -> None:
    generate(generate_config(tmp_path))
    assert (tmp_path / "train.jsonl").read_bytes() == (corpus / "train.jsonl").read_bytes()
    generate(generate_config(tmp_path, seed=1))
    assert (tmp_path / "train.jsonl").read_bytes() != (corpus / "train.jsonl").read_bytes()
    assert rows(corpus / "validation.jsonl") != rows(corpus / "train.jsonl")[:50]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": {"carefull": 1.0}}, "no style 'carefull', did you mean 'careful'"),
        ({"quality": {"careful": 0.0}}, "sum to 0"),
        ({"task": {"type": "reasoning_gym", "dataset": "sudoku"}}, "no worked solutions for 'sudoku'"),
        ({"template": "r1_nought"}, "neither a known name"),
    ],
)
def test_bad_configs_leave_nothing_behind(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(generate_config(tmp_path, **changes))
    assert not list(tmp_path.iterdir())
