"""Reasoning-steps reward: does the reasoning proceed in visible steps?"""

import re
from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.response import response, split_reasoning
from megatron_r1.types import Group

_MARKER = re.compile(
    r"^[ \t]*(?:step[ \t]+\d+[.:]|\d+[.)](?=\s)|[-*•](?=\s))|\b(?:first|second|third|next|then|finally),",
    re.IGNORECASE | re.MULTILINE,
)
_OPEN_R1 = re.compile(r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)")


class ReasoningSteps(Reward):
    """min(1, steps / 3): three steps or more in the reasoning earn 1.0, no reasoning 0.0.

    A step is a marker (`Step 1:`, a line that begins with a number or a bullet, `First,` ... `Finally,`) with the text
    up to the next marker. Steps without letters or digits do not count, and steps of the same text count once.

    `compatible = "open-r1"` gives reasoning_steps_reward of open-r1: bare markers, anywhere in the response, repeated
    or not, and of a numbered list only a number at the very beginning (its `^` lacks MULTILINE).
    """

    class Config(Section):
        compatible: Literal["open-r1"] | None = None
        enough: int = Field(3, ge=1)
        """Steps that earn the full score; open-r1 has 3."""

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        if self.config.compatible:
            counts = [len(_OPEN_R1.findall(sample.text)) for sample in group.samples]
        else:
            counts = [count_steps(split_reasoning(response(group.question, s))[0] or "") for s in group.samples]
        return [min(1.0, count / self.config.enough) for count in counts]


def count_steps(reasoning: str) -> int:
    """Steps of different texts."""
    texts = (re.findall(r"\w+", text.lower()) for text in _MARKER.split(reasoning)[1:])
    return len({tuple(words) for words in texts if words})
