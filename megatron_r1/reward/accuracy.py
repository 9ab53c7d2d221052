"""Accuracy reward: is the final answer of a mathematical question right?"""

import logging
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar, Literal

import math_verify
from math_verify import LatexExtractionConfig
from math_verify.parser import NormalizationConfig

from megatron_r1.config.section import Section
from megatron_r1.reward import symbolic
from megatron_r1.reward.base import Reward
from megatron_r1.reward.claims import after_anchor, boxes, claims, tidy
from megatron_r1.reward.numerals import Numeral, numeral, same, without_unit
from megatron_r1.reward.response import AnswerIn, extract_answer, response
from megatron_r1.types import Group

_SIDES = re.compile(r"(?<![<>!\\])=(?![^()]*\))")
_ARGUMENTS = re.compile(
    r"(?<=\\(?:sin|cos|tan))\s*\d+|(?<=[A-Za-z}|])(?:\[[^\[\]]*\]|_(?:\{[^{}]*\}|\w)|\^\{?\d\}?|\([^()]*\))"
)
_LETTERS = re.compile(r"[A-Za-z\\{}|' +-]*")
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")
_DATE = re.compile(r"(?:\\boxed\{)?\\text\s*\{\s*[A-Z][a-z]{2,} \d+\s*\}\}?")
"""And other names with a number, such as `\\text{June 20}`."""
_ENUMERATION = re.compile(r"(\\\{|[(\[])[^()\[\]]*,[^()\[\]]*(\\\}|[)\]])")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_PHRASE = re.compile(r"[^\W\d_]+(?: [^\W\d_]+){0,3}(?: \d+)?")
_OPEN_R1 = LatexExtractionConfig(
    try_extract_without_anchor=False,
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=True
    ),
)
# It announces for every sample that `equations` is deprecated.
logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)

log = logging.getLogger(__name__)


class Accuracy(Reward):
    r"""1.0 for a right answer, 0.0 for a wrong or missing one (DeepSeek-R1, arXiv 2501.12948, section 2.2).

    The reference may be a number, an expression, an equation, a set, an interval, a matrix, a word, a `\text{...}` of
    up to four words, or a text that boxes one of these; otherwise the score is None, which is logged once a question.

    What an answer claims are its boxes or, without a box, the one expression that it states. An answer that claims
    several things is right only where all of them are; those of a reference set such as `1, 2` may stand in several
    boxes. A reference that is a plain number wants a number that has been worked out: an integer, decimal, fraction,
    percentage or power of ten, perhaps behind `x =` and before a unit (units are not compared). `2 + 3`, `2^{10}` or
    an integral may be the question said again, and to pay for them is to pay for leaving out the last step. Anything
    else goes to math-verify behind the guards of `symbolic.py`.
    """

    class Config(Section):
        answer_in: AnswerIn = "tags"
        require_boxed: bool = False
        r"""Only what stands in `\boxed{...}` counts as an answer."""
        compatible: Literal["open-r1"] | None = None
        """The score of open-r1's `accuracy_reward`, which parses the whole response, its reasoning included, joins
        all boxes that stand close together, and computes whatever the answer leaves to be computed."""

    isolated: ClassVar[bool] = True
    judges_correctness: ClassVar[bool] = True
    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        return [self._score(group, number) for number in range(len(group.samples))]

    def _score(self, group: Group, number: int) -> float | None:
        question, sample = group.question, group.samples[number]
        if self.config.compatible == "open-r1":
            score = open_r1_score(question.answer, sample.text)
        else:
            text = extract_answer(response(question, sample), self.config.answer_in)
            score = math_score(question.answer, text, self.config.require_boxed)
        if score is None:
            _report(question.id, question.answer)
        return score


@dataclass(frozen=True)
class Reference:
    """A reference answer, in the simplest form that it has."""

    text: str
    """Tidy LaTeX, or a phrase in lower case."""
    word: bool = False
    numeral: Numeral | None = None


def math_score(reference: str, answer: str | None, require_boxed: bool = False) -> float | None:
    """1.0 when `answer` claims what `reference` says, 0.0 when not, None when `reference` cannot be read."""
    expected = read_reference(reference)
    if expected is None:
        return None
    if not answer:
        return 0.0
    if expected.word:
        inner = boxes(answer)
        parts = inner if inner or require_boxed else [after_anchor(answer)]
        return float(bool(parts) and all(_phrase(part) == expected.text for part in parts or []))
    stated = claims(answer, require_boxed)
    if not stated:
        return 0.0
    if all(_right(expected, claim) for claim in stated):
        return 1.0
    several = len(stated) > 1 and expected.numeral is None and symbolic.is_set(expected.text)
    return float(several and _right(expected, ", ".join(stated)))


@lru_cache(maxsize=4096)
def read_reference(text: str) -> Reference | None:
    """What a reference answer stands for, or None where no rule can compare it."""
    stated = claims(text)
    if not stated or _DATE.fullmatch(text.strip(" $")):
        phrase = _phrase((boxes(text) or [text])[-1])
        # Several words are a name for one thing only where they are marked as a text.
        known = phrase is not None and (" " not in phrase or r"\text" in text)
        return Reference(phrase, word=True) if phrase and known else None
    # A worked solution may box the same answer twice, or the elements of a set one by one.
    joined = ", ".join(stated)
    if number := numeral(without_unit(joined)):
        return Reference(joined, numeral=number)
    return None if symbolic.parse(joined) is None else Reference(joined)


def open_r1_score(reference: str, text: str) -> float | None:
    """open-r1's `accuracy_reward` of a whole response; None where the reference cannot be parsed or verifying fails."""
    expected = _open_r1_reference(reference)
    if not expected:
        return None
    found = math_verify.parse(text, [_OPEN_R1], extraction_mode="first_match", parsing_timeout=None)
    try:
        return float(math_verify.verify(list(expected), found, timeout_seconds=None))
    except Exception:  # as there: whatever sympy raises
        return None


@lru_cache(maxsize=4096)
def _open_r1_reference(text: str) -> tuple[object, ...]:
    return tuple(math_verify.parse(text, extraction_mode="first_match", parsing_timeout=None))


@lru_cache(maxsize=32768)
def _right(expected: Reference, claim: str) -> bool:
    if _tight(claim) == _tight(expected.text):
        return True
    if expected.numeral is None:
        ours, theirs = _ENUMERATION.fullmatch(expected.text), _ENUMERATION.fullmatch(claim)
        if ours and theirs and ours.groups() != theirs.groups():
            return False  # a set, a point and the kinds of intervals, which math-verify tells apart only sometimes
        return symbolic.equal(expected.text, claim if _VARIABLE.search(expected.text) else without_unit(claim))
    if len(claim) > max(symbolic.MAX_LENGTH, 4 * len(expected.text)):
        return False
    # `x = 2 + 3 = 5` claims 5: the last side is the number, the others may not be something else.
    exact = symbolic.rounded if expected.numeral.decimal else symbolic.exact
    *others, last = _SIDES.split(exact(claim))
    number = numeral(without_unit(last))
    if number is None or not same(expected.numeral, number):
        return False
    return all(_is_name(side) or _is_value(expected, side.strip()) for side in others)


def _is_value(expected: Reference, side: str) -> bool:
    number = numeral(side)
    if number is None:
        return symbolic.equal(expected.text, side)
    return expected.numeral is not None and same(expected.numeral, number)


def _is_name(side: str) -> bool:
    """Whether the left side of an equation names a quantity, as `x`, `a_{10}`, `f(2)`, `AB + BC` or nothing do."""
    bare = _ARGUMENTS.sub("", side).strip()
    return not bare or (_LETTERS.fullmatch(bare) is not None and any(character.isalpha() for character in bare))


def _tight(text: str) -> str:
    """Without the spaces that separate nothing."""
    return _SPACE.sub("", text)


def _phrase(text: str) -> str | None:
    """Up to four words without anything else, in lower case."""
    bare = tidy(text).strip("() ")
    return bare.casefold() if len(bare) > 1 and _PHRASE.fullmatch(bare) else None


@cache
def _report(question: str, reference: str) -> None:
    log.warning("question %s gets no accuracy: its reference answer %.80r is no mathematics", question, reference)
