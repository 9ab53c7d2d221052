"""Figures of judged answers: pass rate, pass@k, majority vote, standard error, confidence intervals."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from megatron_r1.rollout.answers import Answer


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


def majority(answers: Sequence[Answer]) -> float | None:
    """Whether the commonest final answer is right, 0 or 1 (cons@n of DeepSeek-R1); ties count their mean.

    Responses without a final answer do not vote; where nobody votes the result is wrong. Answers that mean the same
    but are written differently split their votes. Answers that were not judged vote like the others, and say nothing
    of whether their answer is right; None where no winner was judged.
    """
    votes: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.final is not None:
            votes[answer.final].append(answer)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    # The answers of one vote may differ in their surroundings, and so in their verdicts.
    winners = [pass_rate(alike) for alike in votes.values() if len(alike) == most]
    rates = [rate for rate in winners if rate is not None]
    return statistics.fmean(rates) if rates else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None of fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def interval(values: Sequence[float]) -> list[float] | None:
    """95 % confidence interval of the mean of independent shares, each between 0 and 1; None of fewer than two.

    Wilson's score interval (Wilson 1927, eq. for p'), with the number of independent yes-or-no trials that would have
    the standard error observed: the answers to one question depend on each other, and its difficulty is drawn with
    it. So it stays within [0, 1], and does not shrink to a point where all answers are right.
    """
    error = standard_error(values)
    if error is None:
        return None
    mean, z = statistics.fmean(values), _Z95
    trials = mean * (1 - mean) / error**2 if error else len(values)
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of after - before over the same questions, and its 95 % confidence interval; None of fewer than two.

    The normal interval of paired differences: what makes a question hard counts in both and cancels.
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    error = standard_error(changes)
    if error is None:
        return None
    mean = statistics.fmean(changes)
    return mean, mean - _Z95 * error, mean + _Z95 * error


_Z95 = statistics.NormalDist().inv_cdf(0.975)
