from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group


class Brevity(Reward):
    """1 for a right answer in no tokens, 0 for one in `longest` tokens or more, and for a wrong one."""

    class Config(Section):
        longest: int = 256

    needs_correctness = True

    def __call__(self, group: Group) -> list[float | None]:
        spent = [len(sample.tokens) / self.config.longest for sample in group.samples]
        return [max(0.0, 1 - share) if s.correct else 0.0 for s, share in zip(group.samples, spent, strict=True)]
