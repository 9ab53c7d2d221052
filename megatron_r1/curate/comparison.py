"""Comparisons of two responses: five verdicts, both orders, mean score, and how much the order itself decides.

Arena-Hard (arXiv 2406.11939) has the verdicts. DeepSeek-R1 (arXiv 2501.12948 v2, B.3) asks four times with the order
exchanged at random, averages, and keeps pairs whose scores differ by more than 1.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from megatron_r1.reward.chat_endpoint import Verdict

SCORES = {"A>>B": 2, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -2}
"""By how much the response that is shown first is better."""


class Comparison(Verdict):
    """The judge's answer; it answers the prompt itself, and reasons, before it decides."""

    own_answer: str
    analysis: str
    verdict: Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]


@dataclass(frozen=True)
class Votes:
    """All verdicts on one pair: vote number i shows the pair as it is if i is even, exchanged if i is odd."""

    verdicts: tuple[str, ...]

    @property
    def scores(self) -> list[int]:
        """Of each vote: by how much the pair's first response is better, whichever was shown first. [votes]"""
        return [-SCORES[verdict] if exchanged(vote) else SCORES[verdict] for vote, verdict in enumerate(self.verdicts)]

    @property
    def mean(self) -> float:
        return fmean(self.scores)

    @property
    def flips(self) -> bool:
        """Do the two orders name different winners? A tie is no winner."""
        as_is, turned = sum(self.scores[0::2]), sum(self.scores[1::2])
        return as_is * turned < 0


def exchanged(vote: int) -> bool:
    """Is the pair's second response shown first in this vote?"""
    return vote % 2 == 1


def figures(compared: Sequence[Votes]) -> dict[str, Any]:
    """What the verdicts say of the judge.

    `flip_rate`: share of pairs where exchanging the order exchanges the winner. `first_preferred`: share of the votes
    with a winner that name the response shown first; 0.5 = the order means nothing.
    """
    counts = Counter(verdict for votes in compared for verdict in votes.verdicts)
    first, second = counts["A>>B"] + counts["A>B"], counts["B>A"] + counts["B>>A"]
    return {
        "verdicts": {verdict: counts[verdict] for verdict in SCORES},
        "ties": sum(votes.mean == 0 for votes in compared),
        "position_bias": {
            "flip_rate": fmean(votes.flips for votes in compared) if compared else None,
            "first_preferred": first / (first + second) if first + second else None,
        },
    }
