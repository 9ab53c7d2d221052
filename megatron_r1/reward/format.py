"""Format reward: is the response one block of reasoning and one answer, each where it belongs?"""

import re
from typing import Literal

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.response import Layout, response, segments
from megatron_r1.types import Group

_TAGS: dict[Layout, list[str]] = {
    "tags": ["<think>", "</think>", "<answer>", "</answer>"],
    "after_think": ["<think>", "</think>"],
}
_OPEN_R1 = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE)


class Format(Reward):
    r"""1.0 for `<think>...</think> <answer>...</answer>` and nothing else, otherwise 0.0.

    Both blocks have to hold something, each tag stands exactly once, and only white space is allowed before,
    between and after the blocks. DeepSeek-R1 (arXiv 2501.12948), section 2.2. With `answer_in = "after_think"` the
    answer is all that follows the reasoning, and has no tags.

    open-r1's `format_reward` asks for a line break on either side of each tag. Its regular expression means `$` as the
    end of any line, so it accepts every text behind the answer, and `.*?` runs over tags, so it accepts nested and
    repeated ones, and an empty first block; it never sees a `<think>` that the prompt already holds.
    """

    class Config(Section):
        answer_in: Layout = "tags"
        compatible: Literal["open-r1"] | None = None
        """The score of open-r1's regular expression, whatever `answer_in` says."""

    def __call__(self, group: Group) -> list[float | None]:
        if self.config.compatible == "open-r1":
            return [float(_OPEN_R1.match(sample.text) is not None) for sample in group.samples]
        texts = [response(group.question, sample) for sample in group.samples]
        return [float(well_formed(text, self.config.answer_in)) for text in texts]


def well_formed(text: str, answer_in: Layout = "tags") -> bool:
    """True when the whole response has the form above."""
    parts = segments(text)
    if parts[1::2] != _TAGS[answer_in]:
        return False
    texts = [part.strip() for part in parts[::2]]
    blocks = [1, 3] if answer_in == "tags" else [1, 2]
    return all(bool(part) == (number in blocks) for number, part in enumerate(texts))
