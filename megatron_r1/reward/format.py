"""Format reward: is the response one block of reasoning and one answer, each in its tags?"""

from typing import ClassVar

from megatron_r1.config.section import Section
from megatron_r1.reward.response import segments
from megatron_r1.types import Group

_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


class Format:
    """1.0 for `<think>...</think> <answer>...</answer>` and nothing else, otherwise 0.0.

    Both blocks have to hold something, each tag stands exactly once, and only white space is allowed before,
    between and after the blocks. DeepSeek-R1 (arXiv 2501.12948), section 2.2.
    """

    class Config(Section):
        pass

    isolated: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, group: Group) -> list[float | None]:
        return [1.0 if well_formed(sample.text) else 0.0 for sample in group.samples]


def well_formed(text: str) -> bool:
    """True when the whole response has the form above."""
    parts = segments(text)
    if parts[1::2] != _TAGS:
        return False
    before, thought, between, answer, after = (part.strip() for part in parts[::2])
    return bool(thought and answer) and not (before or between or after)
