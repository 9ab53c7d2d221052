"""Code questions and responses for tests."""

from typing import Any

from megatron_r1.config import component
from megatron_r1.reward.base import Reward
from megatron_r1.reward.code import Code
from megatron_r1.types import Group, Question, Sample

LIMITS = {"wall_seconds": 4.0, "cpu_seconds": 2.0}
"""Short, so that what hangs on purpose does not take long; ample for what does not."""


def reward(**keys: Any) -> Code:
    """The code reward in bubblewrap, built from its section as the judge does it."""
    built: Code = component.build("reward", {"type": "code", "limits": LIMITS, **keys})
    return built


def question(**tests: Any) -> Question:
    """A question with `tests` as its metadata."""
    return Question("q", "none", "prompt", "", {"tests": tests})


def answer(code: str, label: str = "python") -> str:
    """A response whose answer is one block of code."""
    return f"<think>hm</think> <answer>\n```{label}\n{code}\n```\n</answer>"


def score(code_reward: Reward, asked: Question, text: str) -> float | None:
    """The score of one response."""
    (value,) = code_reward(Group(asked, [], [Sample([], [], text, True, 0)]))
    return value
