"""Figures of judged answers: pass rate, pass@k, majority vote, standard error."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from megatron_r1.evaluate.answers import Answer


def pass_at_k(samples: int, correct: int, k: int) -> float:
    r"""Probability that at least one of `k` answers is right, without bias from `samples` answers.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1), in exact integers.

    Raises:
        ValueError: not 1 <= k <= samples, or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right answers among {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_rate(answers: Sequence[Answer]) -> float | None:
    """Share of right answers among those that were judged; None where none was."""
    judged = [answer.correct for answer in answers if answer.correct is not None]
    return sum(judged) / len(judged) if judged else None


def majority(answers: Sequence[Answer]) -> float:
    """Whether the commonest final answer is right, 0 or 1 (cons@n of DeepSeek-R1); ties count their mean.

    Responses without a final answer do not vote; where nobody votes the result is wrong. Answers that mean the same
    but are written differently split their votes.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        if answer.final is not None:
            votes[answer.final].append(bool(answer.correct))
    most = max(map(len, votes.values()), default=0)
    # The answers of one vote may differ in their surroundings, and so in their verdicts.
    winners = [sum(verdicts) / most for verdicts in votes.values() if len(verdicts) == most]
    return statistics.fmean(winners) if winners else 0.0


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None of fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
