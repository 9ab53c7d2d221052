"""Run files of `data decontaminate`, `data filter` and `evaluate`."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cli import VERBS
from megatron_r1.config.evaluation import EvaluateConfig, FilterConfig
from megatron_r1.config.load import dump, load
from megatron_r1.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
SUMS = {"type": "reasoning_gym", "dataset": "chain_sum"}
MATH = {"type": "math", "source": "train.jsonl"}
ENGINE = {"model": {"path": "model"}, "rollout": {"max_model_len": 64, "max_tokens": 32}}


def written(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(tree))
    return path


def test_an_evaluation_samples_as_r1_does_and_judges_as_the_task_does(tmp_path: Path) -> None:
    tree = {"output": "out", **ENGINE, "tasks": {"sums": {"task": SUMS}, "math": {"task": MATH}}}
    config = load(written(tmp_path / "run.toml", tree), [], EvaluateConfig)
    assert (config.rollout.temperature, config.rollout.top_p, config.samples) == (0.6, 0.95, 16)
    assert config.tasks["math"].rewards["accuracy"]["type"] == "accuracy"
    assert config.tasks["sums"].rewards.keys() >= {"format"}
    other = load(tmp_path / "run.toml", ["--rollout.temperature=0", "--rollout.top_p=1"], EvaluateConfig)
    assert (other.rollout.temperature, other.rollout.top_p) == (0.0, 1.0)


def test_a_filter_samples_as_training_does(tmp_path: Path) -> None:
    tree = {"output": "out", "data": {"task": MATH}, "pass_rate": ENGINE}
    config = load(written(tmp_path / "run.toml", tree), [], FilterConfig)
    assert config.pass_rate is not None
    assert (config.pass_rate.rollout.temperature, config.pass_rate.rollout.top_p) == (1.0, 1.0)
    assert (config.pass_rate.min, config.pass_rate.max, config.pass_rate.samples) == (0.0, 1.0, 8)
    assert config.rewards["accuracy"]["type"] == "accuracy"


@pytest.mark.parametrize("override", ["--rollout.top_p=0", "--rollout.top_p=1.1", "--rollout.temperature=-1"])
def test_sampling_out_of_range(tmp_path: Path, override: str) -> None:
    tree = {"output": "out", **ENGINE, "tasks": {"sums": {"task": SUMS}}}
    with pytest.raises(ConfigError, match=override.removeprefix("--").partition("=")[0]):
        load(written(tmp_path / "run.toml", tree), [override], EvaluateConfig)


@pytest.mark.parametrize(
    ("verb", "example"),
    [
        ("data decontaminate", "data/decontaminate.toml"),
        ("data filter", "data/filter.toml"),
        ("evaluate", "evaluate/evaluate.toml"),
        ("evaluate", "evaluate/benchmarks.toml"),
    ],
)
def test_the_examples(verb: str, example: str, tmp_path: Path) -> None:
    module, _, name = VERBS[verb].config.partition(":")
    schema = getattr(importlib.import_module(module), name)
    config = load(EXAMPLES / example, [], schema)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump(config))
    assert load(resolved, [], schema) == config
