import json
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_r1.config.generate import GenerateConfig
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
    assert {row["source"] for row in train} == {"worked"}
    counts = Counter(row["style"] for row in train)
    assert set(counts) == {"careful", "slip"}
    assert 0.7 < counts["careful"] / len(train) < 0.8
    assert summary["train"]["documents"] == len(train) == 1500
    assert summary["train"]["styles"] == counts
    assert summary["train"]["characters"] == sum(len(row["text"]) for row in train)
    assert len(rows(tmp_path / "validation.jsonl")) == 50
    assert summary["heldout_questions"] == 300
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def worked(**changes: object) -> dict[str, object]:
    return {"task": TASK, "template": "r1_zero_short", "quality": {"careful": 1.0}, **changes}


def mixed(output: Path, **sources: dict[str, object]) -> GenerateConfig:
    return GenerateConfig.model_validate({"output": output, "documents": 1000, "sources": sources, "seed": 1})


def test_sources_are_mixed_by_their_shares(tmp_path: Path) -> None:
    config = mixed(
        tmp_path,
        right=worked(share=3.0),
        wrong=worked(quality={"slip": 1.0}, template="Sum. {question}"),
        none=worked(share=0),
    )
    summary = generate(config)
    counts = summary["train"]["sources"]
    assert set(counts) == {"right", "wrong"}
    assert 0.7 < counts["right"] / 1000 < 0.8
    styles = {"right": "careful", "wrong": "slip"}
    for row in rows(tmp_path / "train.jsonl"):
        assert row["style"] == styles[row["source"]]
        assert row["text"].startswith("Sum. ") == (row["source"] == "wrong")


def test_another_source_leaves_the_documents_of_a_source_as_they_are(tmp_path: Path) -> None:
    generate(mixed(tmp_path / "alone", right=worked()))
    generate(mixed(tmp_path / "both", right=worked(), wrong=worked(quality={"slip": 1.0})))
    alone = [row["text"] for row in rows(tmp_path / "alone/train.jsonl")]
    both = [row["text"] for row in rows(tmp_path / "both/train.jsonl") if row["source"] == "right"]
    assert 400 < len(both) < 600
    assert both == alone[: len(both)]


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "echo.py"
    file.write_text(OWN)
    generate(mixed(tmp_path, echo={"type": f"{file}:Echo", "word": "la", "share": 2.0}))
    assert {row["text"] for row in rows(tmp_path / "train.jsonl")} == {"Sing: la"}


OWN = """
from itertools import repeat

from megatron_r1.config.section import Section
from megatron_r1.data.source import Document, Source


class Echo(Source):
    class Config(Section):
        word: str

    def documents(self, seed, exclude):
        return repeat(Document("Sing:", f" {self.config.word}", "song"))
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}, "task": TASK}, "task stand beside"),
        ({"sources": {}}, "at least 1 item"),
        ({"sources": {"a": worked(share=0.0)}}, "shares of .sources. sum to 0"),
        ({"sources": {"a": worked(share=-1.0)}}, "greater than or equal to 0"),
        ({"sources": {"a": worked(task={"type": "reasoning_gym"})}}, "dataset"),
        ({"sources": {"a": {"type": "workd"}}}, "no source is called 'workd', did you mean 'worked'"),
    ],
)
def test_bad_sources(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        generate(GenerateConfig.model_validate({"output": tmp_path, "documents": 10, **changes}))
    assert not list(tmp_path.iterdir())


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
