"""How many words of each language a text holds.

Han and kana are told by script, sentence by sentence. A word in Latin or Cyrillic letters is judged together with its
neighbours: each has a probability in every language (wordfreq's word lists), changing the language between two words
costs something, inside a sentence more than between sentences, and the likeliest sequence is taken (Viterbi). So one
foreign term in a sentence does not count as foreign, a clause of another language does. A language that the lists do
not hold, romanised Chinese or mere noise is likeliest as `UNKNOWN`.

Chosen over the per-word evidence of lingua 2.1.1 and py3langid 0.4.0 in the same scheme: on the tuning half of
tests/reward/data/languages.jsonl all three find the language of more than 99 % of the sentences, but character n-grams
take noise, Polish or romanised Chinese for one of the languages they were given, and the lists are smaller (79 MB of
memory in all, against 202 and 131) and load faster. What no such count sees is whether the words mean anything.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from wordfreq import get_frequency_dict

from megatron_r1.reward.words import OTHER, Word, words

UNKNOWN = OTHER
"""Stands for whatever is in none of `LANGUAGES`."""

_ALPHABETS = {"latin": ("en", "de", "fr", "es", "it", "nl", "pt"), "cyrillic": ("ru", "uk")}
_HAN_AND_KANA = ("ja", "zh")
LANGUAGES = (*_ALPHABETS["latin"], *_ALPHABETS["cyrillic"], *_HAN_AND_KANA, "ko")
"""ISO 639-1 codes of the languages that are told apart."""

CHARACTERS_PER_WORD = 1.7
"""Han characters and kana that weigh as much as one word: the mean of jieba's (zh) and Janome's (ja) words."""

# Tuned on the `tune` half of the labelled set; natural logarithms.
_UNSEEN = np.log(1e-7)
"""Log-probability of a word that a language's list lacks."""
_UNKNOWN = {"latin": np.log(10**-5.7), "cyrillic": np.log(10**-6.3)}
"""Log-probability of any word in `UNKNOWN`; lower for Cyrillic, whose inflected forms the lists often lack."""
_SWITCH, _SWITCH_AT_STOP = 7.0, 4.0
"""Cost of another language within a sentence, and between sentences."""

_REPEAT_WORDS, _REPEAT_CHARACTERS = 4, 7
"""A repetition of so many words, or Han characters and kana, counts once."""

_COMMON = 1e-3
"""Frequency of a language's hundred commonest words; in honest sentences they are less than half of all."""
_COMMON_TO_RARE, _FEW = 2, 8
"""So many common words count for each other one, and so many in any case."""

_KANA = re.compile("[\u3040-\u30ff]")


def word_counts(text: str) -> dict[str, float]:
    """Words of each language in `text`, which is prose (`reward/prose.py`).

    Han characters and kana count `1 / CHARACTERS_PER_WORD` each; what else is a word is in `reward/words.py`. A
    repetition counts once, and a language's commonest words count only among others, which no honest text notices.
    """
    found = words(text)
    rare: Counter[str] = Counter()
    common: Counter[str] = Counter()
    spoken: dict[str, list[str]] = {}  # by language, so that a repetition is one whatever stands in between
    seen: set[tuple[str, ...]] = set()
    for word, language in zip(found, _languages(found), strict=True):
        before = spoken.setdefault(language, [])
        before.append(word.text.lower())
        phrase = (language, *before[-(_REPEAT_CHARACTERS if word.is_cjk else _REPEAT_WORDS) :])
        if phrase not in seen:
            seen.add(phrase)
            (common if _is_common(before[-1], language) else rare)[language] += 1
    return {
        language: (rare[language] + min(common[language], _COMMON_TO_RARE * rare[language] + _FEW))
        / (CHARACTERS_PER_WORD if language in _HAN_AND_KANA else 1.0)
        for language in spoken
    }


def _is_common(word: str, language: str) -> bool:
    return language not in {UNKNOWN, "ko"} and _frequencies(language).get(word, 0.0) >= _COMMON


def main_language(text: str) -> str | None:
    """The language of most words of `text`; None where it has no words, or most are of an unknown language."""
    counts = word_counts(text)
    best = max(counts, key=lambda language: counts[language], default=UNKNOWN)
    return None if best == UNKNOWN else best


def _languages(found: list[Word]) -> list[str]:
    """The language of each word."""
    languages = [word.script for word in found]
    for script in _ALPHABETS:
        indices = [index for index, word in enumerate(found) if word.script == script]
        for index, language in zip(indices, _likeliest([found[i] for i in indices], script), strict=True):
            languages[index] = language
    for start, end, language in _cjk_sentences(found):
        languages[start:end] = [language if own == "cjk" else own for own in languages[start:end]]
    return languages


def _likeliest(found: list[Word], script: str) -> list[str]:
    """The likeliest sequence of languages of words of one script, `UNKNOWN` among them (Viterbi)."""
    if not found:
        return []
    names = (*_ALPHABETS[script], UNKNOWN)
    stay = np.arange(len(names))
    score = _evidence(found[0].text.lower(), script)
    came_from = []
    for before, word in pairwise(found):
        best = int(score.argmax())
        changed = score[best] - (_SWITCH if word.sentence == before.sentence else _SWITCH_AT_STOP)
        came_from.append(np.where(changed > score, best, stay))
        score = np.maximum(score, changed) + _evidence(word.text.lower(), script)
    path = [int(score.argmax())]
    for origin in reversed(came_from):
        path.append(int(origin[path[-1]]))
    return [names[index] for index in reversed(path)]


@lru_cache(maxsize=200_000)
def _evidence(word: str, script: str) -> NDArray[np.float64]:
    """Log-probability of the word in each language of its script, and in `UNKNOWN`. [languages + 1]"""
    found = [_frequencies(language).get(word) for language in _ALPHABETS[script]]
    return np.array([*(np.log(value) if value else _UNSEEN for value in found), _UNKNOWN[script]])


@cache
def _frequencies(language: str) -> dict[str, float]:
    frequencies: dict[str, float] = get_frequency_dict(language, wordlist="small")
    return frequencies


def _cjk_sentences(found: list[Word]) -> Iterator[tuple[int, int, str]]:
    """Start, end and language of the sentences: Japanese has kana, more than it has simplified Han characters.

    A sentence of Han characters that both languages write is of the language of the other sentences, Chinese where
    there are none.
    """
    starts = [0, *(i for i in range(1, len(found)) if found[i].sentence != found[i - 1].sentence), len(found)]
    judged = []
    for start, end in pairwise(starts):
        letters = "".join(word.text for word in found[start:end] if word.is_cjk)
        kana, simplified = len(_KANA.findall(letters)), sum(map(_only_chinese, letters))
        judged.append((start, end, len(letters), "ja" if kana > simplified else "zh" if simplified else None))
    weights = Counter[str]()
    for _, _, length, language in judged:
        if language:
            weights[language] += length
    default = "ja" if weights["ja"] > weights["zh"] else "zh"
    yield from ((start, end, language or default) for start, end, _, language in judged)


@lru_cache(maxsize=50_000)
def _only_chinese(character: str) -> bool:
    """True for a Han character that Japan's standard set lacks, as most simplified ones."""
    try:
        character.encode("shift_jis")
    except UnicodeEncodeError:
        return True
    return False
