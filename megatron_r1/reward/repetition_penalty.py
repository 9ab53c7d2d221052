"""Repetition penalty: how much of a response says again what it has said?"""

import re
from typing import Literal, Self

import rjieba
from pydantic import Field, model_validator

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.prose import CJK, normalised
from megatron_r1.reward.response import response
from megatron_r1.types import Group

_LONGEST_RUN = 32
"""Characters in a row, letters or none, that may be a word or a rule; a longer row is counted by characters."""
_PIECE = re.compile(rf"(?P<cjk>[{CJK}]+)|(?P<word>(?:(?![{CJK}])[^\W_])+)|(?P<other>(?:[\W_])+)")


class RepetitionPenalty(Reward):
    """(1 - distinct n-grams / all n-grams) * max_penalty: from 0 (nothing repeated) down to `max_penalty`.

    get_repetition_penalty_reward of open-r1, after "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv
    2502.03373, appendix C.2). Words are letters and digits between anything else, in lower case; Chinese is cut into
    words by jieba (its Rust port: the original has had no release since 2020). A row of more than 32 letters, or of 32
    signs and spaces, is counted by characters, so that padding without words is seen as well. Fewer than `ngram`
    words are not penalised.

    `compatible = "open-r1"` gives the original's words: for `language = "en"` whatever stands between white space,
    punctuation included, for `"zh"` all pieces that jieba finds, spaces included.
    """

    class Config(Section):
        compatible: Literal["open-r1"] | None = None
        language: Literal["en", "zh"] | None = None
        """Only with `compatible`, where it must be given; otherwise every word is cut as its script asks."""
        ngram: int = Field(3, ge=1)
        max_penalty: float = Field(-1.0, le=0)

        @model_validator(mode="after")
        def _language_of_the_original(self) -> Self:
            if (self.compatible is None) != (self.language is None):
                raise ValueError('`language` and `compatible = "open-r1"` go together')
            return self

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        if self.config.language == "en":
            texts = [sample.text.lower().split() for sample in group.samples]
        elif self.config.language == "zh":
            texts = [list(rjieba.cut(sample.text)) for sample in group.samples]
        else:
            texts = [words(response(group.question, sample)) for sample in group.samples]
        return [self.config.max_penalty * repeated_share(text, self.config.ngram) for text in texts]


def repeated_share(text: list[str], ngram: int) -> float:
    """Share of the n-grams that have stood before; 0.0 where there is none."""
    total = len(text) - ngram + 1
    if total <= 0:
        return 0.0
    distinct = len({tuple(text[start : start + ngram]) for start in range(total)})
    return 1.0 - distinct / total


def words(text: str) -> list[str]:
    """The words of a text in any language, in order and in lower case."""
    found: list[str] = []
    for piece in _PIECE.finditer(normalised(text).lower()):
        if piece["cjk"]:
            found += rjieba.cut(piece["cjk"])
        elif len(piece[0]) > _LONGEST_RUN:
            found += piece[0]
        elif piece["word"]:
            found.append(piece[0])
    return found
