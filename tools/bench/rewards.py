"""Mathematical answers judged per second: the judge with its workers against a plain loop of math-verify.

The loop is what open-r1's accuracy reward does: parse the reference, parse the whole response, verify, for every
sample anew. Both get the same groups, sixteen responses to each question, and start without anything cached: every
round has questions of its own.
"""

import argparse
import itertools
import logging
import random
from collections.abc import Iterator

import math_verify
from math_verify import LatexExtractionConfig
from math_verify.parser import NormalizationConfig
from paired import Comparison, measure, report, seconds

from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Question, Sample

GROUP = 16
SHARES = {"integer": 0.50, "decimal": 0.10, "fraction": 0.15, "expression": 0.15, "set": 0.05, "interval": 0.05}
"""Kinds of references: about what competition and school mathematics has."""
RIGHT, SLIP, GARBAGE = 0.45, 0.45, 0.10
"""Shares of responses that are right, that are wrong but of the same kind, and that answer nothing."""
_OPEN_R1 = LatexExtractionConfig(
    try_extract_without_anchor=False,
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=True
    ),
)


def ways(kind: str, a: int, b: int) -> list[str]:
    """How the answer of `kind` with the numbers `a` and `b` may be written; the reference comes first."""
    return {
        "integer": [f"{a}", f"{a}", f"{a:,}", f"x = {a}", rf"{a}\text{{ cm}}"],
        "decimal": [f"{a}.{b}", f"{a}.{b}0", rf"{a}.{b}\text{{ kg}}"],
        "fraction": [rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{b}}}", f"{a}/{b}", rf"\frac{{{2 * a}}}{{{2 * b}}}"],
        "expression": [rf"{a}x^2 + {b}\sqrt{{x}}", rf"{b}\sqrt{{x}}+{a}x^2", rf"f(x) = {a}x^2+{b}\sqrt{{x}}"],
        "set": [f"{a}, {a + b}", rf"\{{{a + b}, {a}\}}", f"x={a}, x={a + b}"],
        "interval": [rf"({-a}, {b}]", rf"\left({-a},{b}\right]"],
    }[kind]


def groups(number: int, seed: int) -> list[Group]:
    """`number` questions with `GROUP` responses each, boxed behind a reasoning of some hundred words."""
    draw = random.Random(seed)
    return [_group(f"{seed}-{index}", draw) for index in range(number)]


def _group(name: str, draw: random.Random) -> Group:
    kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
    a, b = draw.randrange(11, 2000), draw.randrange(2, 99)
    reference = ways(kind, a, b)[0]
    # A policy repeats its mistakes: few different wrong answers share a group.
    slips = [(a + draw.choice([-1, 1, 10]), b + draw.choice([0, 1])) for _ in range(3)]
    samples = []
    for _ in range(GROUP):
        outcome = draw.choices(["right", "slip", "garbage"], [RIGHT, SLIP, GARBAGE])[0]
        numbers = (a, b) if outcome == "right" else draw.choice(slips)
        answer = rf"So the answer is $\boxed{{{draw.choice(ways(kind, *numbers))}}}$."
        if outcome == "garbage":
            answer = draw.choice(["I am not sure.", r"\boxed{}", "We need to", r"\boxed{\text{unknown}}"])
        thought = " ".join(draw.choices(["so", "then", "we", "get", "x", "=", "4", "and", "check"], k=200))
        samples.append(Sample([], [], f"<think>{thought}</think>\n{answer}", True, 0))
    return Group(Question(name, "math", "q", reference), [], samples)


def plain_loop(asked: list[Group]) -> None:
    """open-r1's `accuracy_reward`."""
    for group in asked:
        for sample in group.samples:
            gold = math_verify.parse(group.question.answer, extraction_mode="first_match")
            found = math_verify.parse(sample.text, [_OPEN_R1], extraction_mode="first_match")
            math_verify.verify(gold, found)


def main() -> None:
    """Print how many answers both judge in a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=250, help="a round; times 16 answers (default %(default)s)")
    parser.add_argument("--share", type=int, default=10, help="the loop gets one in so many (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the judge (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs that are measured (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify announces a deprecated option for every answer
    rounds = [groups(options.questions, seed) for seed in range(options.rounds + 1)]

    def each() -> Iterator[list[Group]]:
        return itertools.cycle(rounds)

    ours, theirs = each(), each()
    with Judge({"accuracy": {"type": "accuracy", "answer_in": "after_think"}}, workers=options.workers) as judge:

        def judged() -> float:
            asked = next(ours)
            return len(asked) * GROUP / seconds(lambda: judge(asked))

        def looped() -> float:
            asked = next(theirs)[:: options.share]
            return len(asked) * GROUP / seconds(lambda: plain_loop(asked))

        comparison = Comparison("Judge", "answers/s", "a loop of math_verify", judged, looped)
        measure([comparison], options.rounds)
    report("Mathematical answers", [comparison], options.json, workers=options.workers, questions=options.questions)


if __name__ == "__main__":
    main()
