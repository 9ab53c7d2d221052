"""What drops a response from a data set: DeepSeek-R1 keeps no mixed languages, long paragraphs or code blocks in the
reasoning (arXiv 2501.12948, section 2.3.3 of v1, B.3 of v2), and no repetition.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.config.collect import FiltersSection
from megatron_r1.reward.format import well_formed
from megatron_r1.reward.language import LANGUAGES, main_language
from megatron_r1.reward.language_consistency import consistency, question_language
from megatron_r1.reward.prose import prose
from megatron_r1.reward.repetition_penalty import repeated_share, words
from megatron_r1.reward.response import split_reasoning
from megatron_r1.types import Question

_FENCE = re.compile(r"```|^ {0,3}~~~", re.MULTILINE)


@dataclass(frozen=True)
class Reading:
    """A response as filters see it."""

    question: Question
    response: str
    """All of it, `<think>` included."""
    finished: bool
    """False when it was cut at the length limit."""
    tokens: int

    @cached_property
    def reasoning(self) -> str:
        """Empty where there is none."""
        return split_reasoning(self.response)[0] or ""


def active(section: FiltersSection) -> list[str]:
    """Names of the filters that are on, in their order."""
    return [name for name in FILTERS if getattr(section, name)]


def fault(reading: Reading, section: FiltersSection) -> tuple[str, str] | None:
    """The first filter that drops the response, and what it saw; None where all let it pass.

    Raises:
        DataError: a question's metadata name a language that is not told apart.
    """
    for name in active(section):
        seen = FILTERS[name](reading, section)
        if seen is not None:
            return name, seen
    return None


def _truncated(reading: Reading, section: FiltersSection) -> str | None:
    return None if reading.finished else f"cut after {reading.tokens} tokens"


def _broken_characters(reading: Reading, section: FiltersSection) -> str | None:
    for sign in reading.response:
        if sign == "\ufffd" or (sign not in "\n\t\r" and unicodedata.category(sign) == "Cc"):
            return f"U+{ord(sign):04X}"
    return None


def _well_formed(reading: Reading, section: FiltersSection) -> str | None:
    assert section.well_formed is not None
    good = well_formed(reading.response, section.well_formed)
    return None if good else f"not of the form {section.well_formed!r}"


def _length(reading: Reading, section: FiltersSection) -> str | None:
    bounds = section.length
    assert bounds is not None
    short = reading.tokens < bounds.min_tokens
    long = bounds.max_tokens is not None and reading.tokens > bounds.max_tokens
    return f"{reading.tokens} tokens" if short or long else None


def _code_blocks(reading: Reading, section: FiltersSection) -> str | None:
    return "a fence in the reasoning" if _FENCE.search(reading.reasoning) else None


def _long_paragraphs(reading: Reading, section: FiltersSection) -> str | None:
    assert section.long_paragraphs is not None
    longest = max((len(line.strip()) for line in reading.reasoning.splitlines()), default=0)
    return f"{longest} characters" if longest > section.long_paragraphs.max_characters else None


def _repetition(reading: Reading, section: FiltersSection) -> str | None:
    assert section.repetition is not None
    share = repeated_share(words(reading.response), section.repetition.ngram)
    return f"{share:.3f} of the n-grams" if share > section.repetition.max_share else None


def _mixed_language(reading: Reading, section: FiltersSection) -> str | None:
    assert section.mixed_language is not None
    if not reading.reasoning.strip():
        return None
    target = section.mixed_language.language or question_language(reading.question)
    target = target or main_language(prose(reading.reasoning).open) or LANGUAGES[0]
    share = consistency(reading.reasoning, target)
    return f"{share:.3f} of the words are {target}" if share < section.mixed_language.min_share else None


FILTERS: dict[str, Callable[[Reading, FiltersSection], str | None]] = {
    "truncated": _truncated,
    "broken_characters": _broken_characters,
    "well_formed": _well_formed,
    "length": _length,
    "code_blocks": _code_blocks,
    "long_paragraphs": _long_paragraphs,
    "repetition": _repetition,
    "mixed_language": _mixed_language,
}
"""Key of [filters] -> what was seen of the fault, or None; the cheap ones first."""
