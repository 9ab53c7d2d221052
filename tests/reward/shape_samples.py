"""Groups for tests of rewards that look at the shape of a response."""

from typing import Any

from megatron_r1.config import component
from megatron_r1.types import Group, Question, Sample


def sample(text: str = "", tokens: int = 0, correct: bool | None = None, finished: bool = True) -> Sample:
    return Sample([0] * tokens, [0.0] * tokens, text, finished, 0, correct=correct)


def thought(reasoning: str) -> str:
    return f"<think>{reasoning}</think> <answer>5</answer>"


def score(reward: str, *samples: Sample | str, metadata: dict[str, Any] | None = None, **config: Any) -> list[Any]:
    """Scores of one group; a string is a sample's text."""
    question = Question("q-1", "none", "User: 2 + 3? Assistant:", "5", metadata or {})
    group = Group(question, [], [sample(item) if isinstance(item, str) else item for item in samples])
    return list(component.build("reward", {"type": reward, **config})(group))
