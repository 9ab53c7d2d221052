"""Run files of `collect`."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.config.collect import CollectConfig, RowsSource, SampleSource
from megatron_r1.config.load import dump, load, validate
from megatron_r1.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "collect"
SUMS = {"type": "reasoning_gym", "dataset": "chain_sum"}
MODELS = {"zero": {"path": "zero/hf", "rollout": {"max_model_len": 128, "max_tokens": 64}}}
SAMPLE = {"kind": "sample", "model": "zero", "data": {"task": SUMS}, "questions": 4}
ROWS = {"kind": "rows", "data": {"source": "chat.jsonl"}}


def config(sources: dict[str, Any], **changes: Any) -> CollectConfig:
    return validate(CollectConfig, {"output": "out", "models": MODELS, "sources": sources, **changes}, where="the test")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples(example: Path, tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.toml"
    first = load(example, [], CollectConfig)
    resolved.write_text(dump(first))
    assert load(resolved, [], CollectConfig) == first


def test_defaults_of_both_kinds() -> None:
    found = config({"a": SAMPLE, "b": ROWS}, filters={"code_blocks": True})
    sample, rows = found.sources["a"], found.sources["b"]
    assert isinstance(sample, SampleSource)
    assert isinstance(rows, RowsSource)
    assert sample.rewards.keys() == {"task", "format"}
    assert (sample.keep, sample.samples, sample.response) == ("correct", 4, "{response}")
    assert found.filters_of(sample).code_blocks
    assert not found.filters_of(rows).code_blocks
    assert found.counting() == Path("zero/hf")


def test_a_source_samples_its_model_in_its_own_way() -> None:
    changes = {"temperature": 0.5, "max_tokens": 16, "batch": 7}
    source = config({"a": {**SAMPLE, **changes}}).sources["a"]
    assert isinstance(source, SampleSource)
    sampling = source.sampling(config({"a": SAMPLE}).models["zero"], samples=3, seed=5)
    rollout = sampling.rollout
    assert (rollout.temperature, rollout.top_p, rollout.max_tokens, rollout.max_model_len) == (0.5, 1.0, 16, 128)
    assert (sampling.samples, sampling.seed, sampling.batch, sampling.model.path) == (3, 5, 7, Path("zero/hf"))


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ({}, {}, "sources"),
        ({"a": {**SAMPLE, "kind": "read"}}, {}, "kind|tag"),
        ({"a": {**SAMPLE, "model": "nul"}}, {}, "sources.a names model 'nul'.*it has zero"),
        ({"a": {**ROWS, "rewrite": {"model": "one", "prompt": "p"}}}, {}, "sources.a.rewrite names model 'one'"),
        ({"a": {**SAMPLE, "max_tokens": 128}}, {}, "leaves no room"),
        ({"a": {**SAMPLE, "share": 1.0}, "b": ROWS}, {}, "either all sources have a `share` or none; b"),
        ({"a": {**SAMPLE, "min_reward": {"formal": 1.0}}}, {}, "min_reward names 'formal', did you mean 'format'"),
        ({"a": ROWS}, {"models": {}}, "tokenizer"),
        ({"a": {**ROWS, "prompt": "x"}}, {}, "unknown key"),
        ({"a": SAMPLE}, {"decontaminate": {"evaluation": {"x": {}}}}, "either `data` or `task`"),
    ],
)
def test_bad_run_files(sources: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(sources, **changes)


def test_an_override_reaches_into_a_source(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({"output": "out", "models": MODELS, "sources": {"a": SAMPLE}}))
    found = load(file, ["--sources.a.samples=9"], CollectConfig).sources["a"]
    assert isinstance(found, SampleSource)
    assert found.samples == 9
