"""Length reward of Kimi k1.5: of a group's answers, the short right ones are worth most."""

from typing import Literal

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group


class Length(Reward):
    """lambda = 0.5 - (length - min) / (max - min) over the group; wrong answers get min(0, lambda).

    Kimi k1.5 (arXiv 2501.12599), "length penalty", with lengths in tokens. 0.0 for all where all are of one length.
    None where nothing judged the answer; such samples do not count for min and max.

    `compatible = "open-r1"` gives len_reward of open-r1: lengths in characters, and an answer that cannot be judged
    counts as right. (There the samples of several questions may be compared; here they are always one question's.)
    """

    needs_correctness = True

    class Config(Section):
        compatible: Literal["open-r1"] | None = None

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        if self.config.compatible:
            judged = [(len(sample.text), sample.correct is not False) for sample in group.samples]
            return list(length_rewards(judged))
        judged = [(sample.length, sample.correct) for sample in group.samples if sample.correct is not None]
        scores = iter(length_rewards(judged))
        return [None if sample.correct is None else next(scores) for sample in group.samples]


def length_rewards(judged: list[tuple[int, bool]]) -> list[float]:
    """One value for each (length, right or wrong)."""
    lengths = [length for length, _ in judged]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest == longest:
        return [0.0] * len(judged)
    values = [(0.5 - (length - shortest) / (longest - shortest), correct) for length, correct in judged]
    return [value if correct else min(0.0, value) for value, correct in values]
