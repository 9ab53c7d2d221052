"""What counts as a result of a stage, and what "@stage" means."""

import hashlib
from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from megatron_r1.recipe.artefacts import artefacts, content, is_there
from megatron_r1.recipe.hashes import Hashes
from megatron_r1.recipe.plan import Plan

RESULTS = {"hf/config.json": "{}", "train.bin": "b", "train.idx": "i", "samples.jsonl": "s"}
FIGURES = {"summary.json": "{}", "metrics.jsonl": "m"}
OTHERS = (
    "checkpoints/step_1/x.pt", "logs/engine-0.log", "tensorboard/events", "sync/x", "cache/x",
    "heartbeats/rank_0.json", "bad_batches/step_1/rank_0.pt", "stage.json", "stage.toml", "lineage.json", "config.toml",
    "run.log", "run.json", "report.html", ".x.partial", "hf/y.partial",
)  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    for name, text in {**RESULTS, **FIGURES, **dict.fromkeys(OTHERS, "x")}.items():
        file = tmp_path / "base" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Plan(title="", seed=0, output=tmp_path, stages=[], services={}, models={}, figures={})


def folder_hash(files: dict[str, str]) -> str:
    lines = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_artefacts(plan: Plan) -> None:
    assert set(artefacts(plan.output / "base")) == {*RESULTS, *FIGURES}


def test_content(plan: Plan) -> None:
    hashes = Hashes(plan.output / "memory")
    assert content(plan, "@base", hashes) == folder_hash(RESULTS)
    assert content(plan, "@base/train", hashes) == folder_hash({"train.bin": "b", "train.idx": "i"})
    assert content(plan, "@base/summary.json", hashes) == hashlib.sha256(b"{}").hexdigest()
    assert content(plan, "@base/checkpoints", hashes) == folder_hash({"step_1/x.pt": "x"})


def test_figures_do_not_change_what_a_stage_is(plan: Plan) -> None:
    before = content(plan, "@base", Hashes(plan.output / "memory"))
    (plan.output / "base/summary.json").write_text('{"seconds_total": 3}')
    assert content(plan, "@base", Hashes(plan.output / "memory")) == before
    (plan.output / "base/hf/config.json").write_text("[]")
    assert content(plan, "@base", Hashes(plan.output / "memory")) != before


@pytest.mark.parametrize("text", ["@base/hff", "@none", "@base/train.jsonl"])
def test_missing(plan: Plan, text: str) -> None:
    assert not is_there(plan, text)
    with pytest.raises(DataError, match="is not there: the stage"):
        content(plan, text, Hashes(plan.output / "memory"))
