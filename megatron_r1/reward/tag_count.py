"""Tag-count reward: partial credit for the layout that `format` asks for in full."""

from typing import Literal

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.response import response, segments
from megatron_r1.types import Group

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_OPEN_R1 = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


class TagCount(Reward):
    """0.25 for each of the four tags that stands exactly once and in its place among the others.

    In its place means that no tag stands on the wrong side of it, so two tags that are exchanged both lose theirs.

    `compatible = "open-r1"` gives tag_count_reward of open-r1: a tag counts only together with the line breaks that
    its recipes write, in any order, and a `<think>` that the template wrote is not counted.
    """

    class Config(Section):
        compatible: Literal["open-r1"] | None = None

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        if self.config.compatible:
            return [0.25 * sum(sample.text.count(tag) == 1 for tag in _OPEN_R1) for sample in group.samples]
        return [0.25 * tags_in_place(response(group.question, sample)) for sample in group.samples]


def tags_in_place(text: str) -> int:
    """How many of the four tags stand once, with only earlier ones before and only later ones behind."""
    places = [_TAGS.index(tag) for tag in segments(text)[1::2]]
    once = [place for place in range(len(_TAGS)) if places.count(place) == 1]
    indices = {place: places.index(place) for place in once}
    return sum(max(places[: indices[p] + 1]) == p == min(places[indices[p] :]) for p in once)
