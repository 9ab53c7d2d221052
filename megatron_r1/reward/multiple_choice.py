r"""Multiple-choice reward: does the answer name the right option, and no other?"""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import ClassVar

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.claims import after_anchor, boxes, tidy
from megatron_r1.reward.response import AnswerIn, extract_answer, response
from megatron_r1.types import Group

_LETTER = re.compile(r"(?:(?i:option|choice)\s+)?(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])(?![^\W_]))")
_MARK = re.compile(r"\s*(?:\*\*|[).:\],–—-])*\s*")
_HEDGE = re.compile(r"(?i)\b(?:or|and|either|neither|nor|not|maybe|perhaps|both|all|none)\b|n't\b|[/&]")
_TEXT = re.compile(r"\\text\w*\s*\{([^{}]*)\}")
_NOISE = re.compile(r"[\s*`$\"'.]+")


class MultipleChoice(Reward):
    r"""1.0 for the letter of the right option, 0.0 for anything else (DeepSeek-R1: STEM questions).

    `metadata["choices"]` holds the options' texts, the reference answer is a letter. Accepted are `B`, `(B)`, `b.`,
    `**B**`, `Option B`, `\boxed{B}`, `B) text of option B`, "the answer is B" with a reason that names no other option,
    and the option's text alone, whatever its case. Several letters, a letter with another option's text, and letters
    inside prose count nothing. A single letter is a letter, also where an option's text is one.
    The score is None where the question has no options or its reference is none of their letters.
    """

    class Config(Section):
        answer_in: AnswerIn = "tags"

    judges_correctness: ClassVar[bool] = True

    def __call__(self, group: Group) -> list[float | None]:
        question = group.question
        options = [str(text) for text in question.metadata.get("choices", [])]
        letters = ascii_uppercase[: len(options)]
        reference = question.answer.strip().upper()
        if len(reference) != 1 or reference not in letters:
            return [None] * len(group.samples)
        answers = [extract_answer(response(question, s), self.config.answer_in) or "" for s in group.samples]
        return [float(reference in chosen(answer, options)) for answer in answers]


def chosen(answer: str, options: Sequence[str]) -> str:
    """The letter that `answer` settles on; several only where options have the same text, none where it hedges."""
    inner = boxes(answer)
    if inner is None:
        return ""
    explained = after_anchor(answer)
    if not inner:
        return _choice(explained, options, may_explain=explained != answer)
    first, *others = [_choice(part, options, may_explain=False) for part in inner]
    return first if all(other == first for other in others) else ""


def _choice(part: str, options: Sequence[str], may_explain: bool) -> str:
    text = tidy(_TEXT.sub(r" \1 ", part))
    letters = ascii_uppercase[: len(options)]
    texts = [_plain(option) for option in options]
    named = _LETTER.match(text)
    if not named or named.group(1, 2, 3)[named.lastindex - 1 if named.lastindex else 0].upper() not in letters:
        return "".join(letter for letter, own in zip(letters, texts, strict=True) if own and own == _plain(text))
    letter = (named[1] or named[2] or named[3]).upper()
    rest = text[named.end() :]
    mark = _MARK.match(rest)
    body = _plain(rest[mark.end() :] if mark else rest)
    if not body:
        return letter
    own = texts[letters.index(letter)]
    if body == own and (rest[:1] in ").:],*-–— " or named[3] is None):
        return letter
    whole = "".join(letter for letter, own in zip(letters, texts, strict=True) if own and own == _plain(text))
    others = letters + letters.lower().replace("a", "")  # "a" is an article
    if whole or not may_explain or _HEDGE.search(rest) or re.search(rf"\b[{others}]\b", rest):
        return whole
    return "" if any(other and other != own and other in body for other in texts) else letter


def _plain(text: str) -> str:
    return _NOISE.sub(" ", tidy(text)).strip().casefold()
