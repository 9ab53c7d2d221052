"""The run file in `examples/tasks` holds what it says."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import Questions

ROOT = Path(__file__).parents[2]


def test_shares_rewards_and_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(Path("examples/tasks/mixture.toml"), [], RLConfig)
    assert set(config.rewards) == {
        "accuracy", "code", "multiple_choice", "task", "format", "language_consistency",
    }  # fmt: skip
    questions = Questions(config.data, config.seed).take(0, 1000)
    counts = Counter(question.metadata["member"] for question in questions)
    assert counts == {"math": 260, "code": 170, "science": 220, "logic": 150, "chat": 200}
    rewards = {question.metadata["member"]: question.rewards for question in questions}
    assert rewards == {
        "math": ("accuracy", "format"),
        "code": ("code", "format"),
        "science": ("multiple_choice", "format"),
        "logic": ("task", "format"),
        "chat": ("format", "language_consistency"),
    }
    code = next(question for question in questions if question.metadata["member"] == "code")
    assert "block of code between ``` fences" in code.prompt
