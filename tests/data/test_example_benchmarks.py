"""`examples/evaluate/benchmarks.toml` reads files with the columns of the data sets that it names."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.config.load import validate
from megatron_r1.evaluate.benchmark import benchmark_questions
from tests.contracts.built_in import DATA

ROOT = Path(__file__).parents[2]
ROWS: dict[str, dict[str, Any]] = {
    "aime_2024": {"id": 60, "problem": "How many?", "solution": "...", "answer": "204", "url": "u", "year": "2024"},
    "math_500": {"problem": "Half of 3?", "solution": "s", "answer": "\\frac{3}{2}", "subject": "Algebra", "level": 2},
    "gpqa_diamond": {
        "Question": "Which decays?",
        "Correct Answer": "the muon",
        **{f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)},
        "Subdomain": "Physics",
    },
}
EXPECTED = {
    "aime_2024": ("User｜>How many?\nPlease reason step by step", "204"),
    "math_500": ("Half of 3?", "\\frac{3}{2}"),
    "gpqa_diamond": ("Which decays?", "ABCD"),
    "live_code_bench": ("<｜User｜>", ""),
    "human_eval": ("Complete this Python function", ""),
    "knights_knaves": ("knight", None),
}


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """The example, its sources exchanged for files."""
    tree = tomllib.loads((ROOT / "examples/evaluate/benchmarks.toml").read_text())
    for name, section in tree["tasks"].items():
        if "source" not in section["task"]:
            continue
        path = DATA / "live_code_bench.jsonl"
        if name in ROWS:
            path = tmp_path / f"{name}.jsonl"
            path.write_text(json.dumps(ROWS[name]) + "\n")
        section["task"] = {key: value for key, value in section["task"].items() if key not in ("name", "split")}
        section["task"]["source"] = str(path)
    return validate(EvaluateConfig, tree, where="the example")


@pytest.mark.parametrize("name", EXPECTED)
def test_its_questions(config: EvaluateConfig, name: str) -> None:
    first = benchmark_questions(name, config.tasks[name])[0]
    text, answer = EXPECTED[name]
    assert text in first.prompt
    assert first.prompt.endswith("<｜Assistant｜><think>\n")
    if name == "gpqa_diamond":
        assert first.metadata["choices"]["ABCD".index(first.answer)] == "the muon"
    elif answer is not None:
        assert first.answer == answer
    assert ("tests" in first.metadata) == (name in ("live_code_bench", "human_eval"))


def test_it_samples_as_the_report_says(config: EvaluateConfig) -> None:
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens) == (0.6, 0.95, 32768)
    assert {name: task.samples for name, task in config.tasks.items()} == {
        "aime_2024": 64, "math_500": 16, "gpqa_diamond": 64, "live_code_bench": 8, "human_eval": 8, "knights_knaves": 4,
    }  # fmt: skip
    assert config.tasks.keys() == EXPECTED.keys()
