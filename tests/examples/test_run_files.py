"""The run files of the miniature fit each other."""

import json
from pathlib import Path

import pytest

from megatron_r1.config.corpus import IndexConfig
from megatron_r1.config.generate import GenerateConfig
from megatron_r1.config.load import load
from megatron_r1.config.runs import PretrainConfig, RLConfig, TokenizerConfig
from tests.examples.loaded import FOLDER

WORLD = FOLDER / "world"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])


def test_each_reads_what_the_one_before_writes() -> None:
    corpus = load(WORLD / "generate.toml", [], GenerateConfig)
    tokenizer = load(WORLD / "tokenizer.toml", [], TokenizerConfig)
    index = load(WORLD / "index.toml", [], IndexConfig)
    assert tokenizer.input == [corpus.output / "train.jsonl"]
    assert set(index.inputs.values()) == {corpus.output / "train.jsonl", corpus.output / "validation.jsonl"}
    assert index.tokenizer == tokenizer.output
    for name in ("pretrain", "pretrain_small"):
        pretrain = load(WORLD / f"{name}.toml", [], PretrainConfig)
        assert pretrain.tokenizer == tokenizer.output
        assert pretrain.corpus.train == [index.output / "train"]
        model = json.loads((pretrain.model.path / "config.json").read_text())
        assert model["vocab_size"] == tokenizer.vocab_size
    zero = load(WORLD / "r1_zero.toml", [], RLConfig)
    assert zero.model.path == load(WORLD / "pretrain.toml", [], PretrainConfig).output / "hf"


def test_what_is_held_out_of_the_corpus_is_what_is_evaluated() -> None:
    corpus = load(WORLD / "generate.toml", [], GenerateConfig)
    zero = load(WORLD / "r1_zero.toml", [], RLConfig)
    assert corpus.heldout is not None
    assert corpus.heldout.task == zero.heldout.task
    assert zero.evaluation.questions <= corpus.heldout_questions
    for source in corpus.sources.values():
        assert source.get("task", zero.data.task) == zero.data.task


def test_the_small_model_is_dense_and_smaller() -> None:
    large, small = (json.loads((WORLD / name / "config.json").read_text()) for name in ("model", "small"))
    assert large["architectures"] == ["DeepseekV3ForCausalLM"]
    assert small["architectures"] == ["Qwen3ForCausalLM"]
    assert small["hidden_size"] < large["hidden_size"]


def test_examples_for_few_shot_prompts_are_right() -> None:
    lines = Path(WORLD / "examples.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        expression = row["question"].rpartition(": ")[2].removesuffix(" =")
        assert row["response"].endswith(f"</think> The answer is {eval(expression)}.")
        assert row["response"].startswith(" <think>First, ")
    assert len(lines) >= 8
