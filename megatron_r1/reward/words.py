"""The words of a prose text, as they stand, whatever they are hidden in: the counting behind `reward/language.py`."""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from megatron_r1.reward.prose import CJK, HIDDEN_WORDS

OTHER = "?"
"""Stands for scripts that are not told apart, and for a word in several."""

_CJK_RUN = re.compile(f"[{CJK}]+")
_TOKEN = re.compile(r"\w+|[.!?;:。！？；：\n]")
_GLUE = re.compile(r"_+|(?<=[a-z])(?=[A-Z])")
_DIGITS_INSIDE = re.compile(r"[^\W\d_]\d+[^\W\d_]")
_LONGEST_WORD, _USUAL_WORD = 40, 5
"""Letters; what is longer are several words without spaces."""
_SPELLED = re.compile("(?:(?<!\\w)[A-Za-zÀ-ɏ\u0400-\u052f][ .*-]){16,}")
"""Words spelled letter by letter."""
_NAMES = 2
"""So many capitalised Latin words in a row within a sentence of another script are a name or an abbreviation."""


class Word(NamedTuple):
    """A word, or a single Han character or kana."""

    text: str
    script: str
    """`latin`, `cyrillic`, `cjk`, `ko`, or `OTHER`."""
    sentence: int

    @property
    def is_cjk(self) -> bool:
        """True for a single Han character or kana."""
        return self.script == "cjk"


def words(text: str) -> list[Word]:
    """The words of `text`, and its single Han characters and kana, in order.

    A word has two letters or more. Numbers are none, nor identifiers of up to three words (unless they are most of
    the text), nor single names in Latin letters within a sentence of another script.
    """
    return list(_without_names(list(_words(text))))


def _words(text: str) -> Iterator[Word]:
    """The words, and the single Han characters and kana, in order."""
    sentence = 0
    text = _SPELLED.sub(lambda spelled: re.sub("[ .*-]", "", spelled[0]) + " ", text)
    tokens = _TOKEN.findall(_CJK_RUN.sub(r" \g<0> ", text))
    identifiers = sum(1 for token in tokens if _GLUE.search(token))
    most_in_a_name = 1 if 2 * identifiers > len(tokens) else HIDDEN_WORDS - 1
    for token in tokens:
        if not token[0].isalnum() and token[0] != "_":
            sentence += 1
        elif _CJK_RUN.match(token):
            yield from (Word(character, "cjk", sentence) for character in token)
        else:
            yield from (Word(word, _script(word), sentence) for word in _split(token, most_in_a_name))


def _split(token: str, most_in_a_name: int) -> list[str]:
    """What of `token` is a word: nothing for a number, a single letter or an identifier."""
    if _GLUE.search(token):
        parts = [part for part in _GLUE.split(token) if len(part) > 1 and part.isalpha()]
        return parts if len(parts) > most_in_a_name else []
    letters = sum(map(str.isalpha, token))
    if letters > _LONGEST_WORD:
        return [token[start : start + _USUAL_WORD] for start in range(0, len(token), _USUAL_WORD)]
    is_word = letters == len(token) > 1 or (letters > 2 and _DIGITS_INSIDE.search(token))
    return [token] if is_word else []


def _without_names(found: list[Word]) -> Iterator[Word]:
    """Leaves out single names in Latin letters within a sentence of another script."""
    runs = groupby(found, key=lambda word: (word.sentence, word.script == "latin"))
    parts = [(sentence, latin, list(part)) for (sentence, latin), part in runs]
    others = {sentence for sentence, latin, _ in parts if not latin}
    for sentence, latin, part in parts:
        capitalised = all(word.text[0].isupper() for word in part)
        if not (latin and capitalised and len(part) <= _NAMES and sentence in others):
            yield from part


@lru_cache(maxsize=200_000)
def _script(word: str) -> str:
    """The one script of a word's letters; `OTHER` for a mixture (look-alike letters) and for scripts not told."""
    scripts = {_letter_script(ord(letter)) for letter in word if letter.isalpha()}
    return scripts.pop() if len(scripts) == 1 else OTHER


def _letter_script(code: int) -> str:
    if code < 0x250 or 0x1E00 <= code < 0x1F00:
        return "latin"
    if 0x400 <= code < 0x530:
        return "cyrillic"
    if 0xAC00 <= code < 0xD7B0:
        return "ko"
    return OTHER
