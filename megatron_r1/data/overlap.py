"""Which texts share words with which: normalised words, and an index of n-grams that finds the texts that hold one."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import regex

_INVISIBLE = regex.compile(r"\p{Cf}+")
"""Soft hyphens, joiners, direction marks: nobody sees them, so they must not hide a copy."""
_ASCII_WORDS = re.compile("[a-z0-9]+")
"""What `_WORDS` finds in folded ASCII, several times as fast."""
_WORDS = regex.compile(
    r"""(?V1x)
    [\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*  # scripts without spaces: a character
    | [[\p{L}\p{N}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+
    """
)


def words(text: str) -> list[str]:
    """The words of `text` by which texts are compared.

    Unicode NFKC (full-width letters, ligatures and superscripts become plain ones), invisible format characters
    removed, case folded; then every run of letters, digits and combining marks is a word. Chinese, Japanese, Thai, Lao,
    Khmer and Burmese stand without spaces, so each of their characters is a word. White space, punctuation and symbols
    part words and count for nothing: "x^2+1" and "X^2 + 1." are the same three words.
    """
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    # Folding may undo the normal form (that of a capital with an accent, for one), so it is restored.
    found: list[str] = _WORDS.findall(unicodedata.normalize("NFKC", plain.casefold()))
    return found


def bare(text: str) -> str:
    """`text` without white space and invisible characters, case folded: equal for copies of one text.

    Unlike `words` it keeps signs and punctuation, for 3 + 4 and 3 - 4 are different questions.
    """
    visible = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    return "".join(visible.casefold().split())


@dataclass(frozen=True)
class Match:
    """Words that a text has in common with an indexed one."""

    group: str
    """Which texts were indexed under this name, such as an evaluation set's."""
    row: int
    """Which of them it is; the first where several hold the words."""
    shared: str
    """The normalised n-gram; all words where the texts are shorter than that."""


class NgramIndex:
    """The word n-grams of groups of texts.

    A text of fewer than `n` words is held as a whole, and only found by a text with the same words. The n-grams
    themselves are the keys, so two different ones are never taken for each other. Memory: about 200 bytes each.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._origins: dict[str, tuple[tuple[str, int], ...]] = {}

    def __len__(self) -> int:
        return len(self._origins)

    def add(self, text: str, group: str, row: int) -> bool:
        """Index one text; False where it has no words, so that nothing can be compared with it."""
        alone = ((group, row),)
        parts = words(text)
        for ngram in ngrams(parts, self.n):
            known = self._origins.setdefault(ngram, alone)  # one tuple for all n-grams of a text
            if all(name != group for name, _ in known):
                self._origins[ngram] = (*known, *alone)
        return bool(parts)

    def matches(self, text: str) -> list[Match]:
        """The first n-gram that `text` shares with each group, in the order of `text`."""
        found: dict[str, Match] = {}
        for ngram in ngrams(words(text), self.n):
            for group, row in self._origins.get(ngram, ()):
                found.setdefault(group, Match(group, row, ngram))
        return list(found.values())


def ngrams(parts: list[str], n: int) -> Iterator[str]:
    """Each `n` neighbouring words, joined by spaces; all of them where there are fewer; nothing without words."""
    for start in range(max(len(parts) - n + 1, min(len(parts), 1))):
        yield " ".join(parts[start : start + n])
