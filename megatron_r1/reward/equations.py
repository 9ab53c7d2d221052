"""Equations reward: is each equation of the reasoning right? A process reward by rule, for sums and products."""

import re
from collections.abc import Iterator
from fractions import Fraction

from megatron_r1.reward.base import Reward
from megatron_r1.types import Group

_NUMBER = r"-?\d{1,12}(?:\.\d{1,9})?"
_EQUATION = re.compile(
    rf"(?<![\w.*/+])(?P<left>{_NUMBER})\s*(?P<operator>[-+*/×÷])\s*(?P<right>{_NUMBER})\s*=\s*(?P<result>{_NUMBER})(?![\d*/])"
)


class Equations(Reward):
    """Share of right ones among the equations `a + b = c` of a response (also -, * and /); None where it has none.

    Each equation is a reasoning step: its end and its score, 1 or 0, go into `sample.step_marks`, which
    `[advantage] type = "process"` learns from (DeepSeekMath, arXiv 2402.03300, 4.1.3, with a rule in the place of its
    process reward model). Numbers are compared exactly. A policy that is rewarded by steps alone learns to write many
    easy ones: keep an eye on the length.
    """

    def __call__(self, group: Group) -> list[float | None]:
        scores: list[float | None] = []
        for sample in group.samples:
            sample.step_marks = list(steps(sample.text))
            rights = [score for _, score in sample.step_marks]
            scores.append(sum(rights) / len(rights) if rights else None)
        return scores


def steps(text: str) -> Iterator[tuple[int, float]]:
    """Where each equation of `text` ends (characters), and 1.0 if it is right."""
    for found in _EQUATION.finditer(text):
        left, right, result = (Fraction(found[name]) for name in ("left", "right", "result"))
        yield found.end(), float(_value(left, found["operator"], right) == result)


def _value(left: Fraction, operator: str, right: Fraction) -> Fraction | None:
    if operator in "/÷":
        return left / right if right else None
    return {"+": left + right, "-": left - right}.get(operator, left * right)
