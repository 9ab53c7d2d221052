"""Language-consistency reward: does the reasoning keep to the language of the question?"""

from functools import lru_cache
from typing import Annotated, ClassVar

from pydantic import AfterValidator

from megatron_r1.config.section import Section
from megatron_r1.errors import DataError
from megatron_r1.reward.base import Reward
from megatron_r1.reward.language import LANGUAGES, main_language, word_counts
from megatron_r1.reward.prose import TAG, prose
from megatron_r1.reward.response import response, split_reasoning
from megatron_r1.types import Group, Question


def _known(language: str) -> str:
    if language not in LANGUAGES:
        raise ValueError(f"{language!r} is not among the languages that are told apart: {', '.join(LANGUAGES)}")
    return language


class LanguageConsistency(Reward):
    """Words of the target language / all words of the chain of thought (DeepSeek-R1, arXiv 2501.12948, eq. 7 of v2,
    section 2.3.2 of v1).

    The target is `language`, else the question's `metadata["language"]`, else the language that
    `metadata["text"]`, the question before its template, is written in; None for all samples where there is neither,
    or it has no language. What counts as a word, and for what language, is in `reward/language.py`; formulas, code,
    numbers, links and tags count for none, and a repeated phrase counts once. Sentences inside of formulas or of
    blocks without code count only where they are in another language: nothing is gained by hiding words there.

    Missing or empty reasoning scores 0.0. Reasoning without any word, only formulas or code, scores 1.0: no word of it
    is in another language, and no text can score more.
    """

    class Config(Section):
        language: Annotated[str, AfterValidator(_known)] | None = None
        """ISO 639-1 code; None = each question's own."""

    isolated: ClassVar[bool] = True  # for its time: a tenth of a second for a long response, and there are thousands

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        target = self.config.language or question_language(group.question)
        if target is None:
            return [None] * len(group.samples)
        return [consistency(split_reasoning(response(group.question, sample))[0], target) for sample in group.samples]


def consistency(reasoning: str | None, target: str) -> float:
    """Share of the reasoning's words that are in `target`."""
    if reasoning is None or not any(map(str.isalnum, TAG.sub("", reasoning))):
        return 0.0
    sentences = prose(reasoning)
    counts, hidden = word_counts(sentences.open), word_counts(sentences.hidden)
    right = counts.pop(target, 0.0)
    hidden.pop(target, None)
    total = right + sum(counts.values()) + sum(hidden.values())
    return right / total if total else 1.0


def question_language(question: Question) -> str | None:
    """The language that `question` says it is in, or that its bare text is in; None where neither is known.

    Raises:
        DataError: its metadata name a language that is not told apart.
    """
    stated = question.metadata.get("language")
    if stated is None:
        return _detected(str(question.metadata.get("text", "")))
    code = str(stated).replace("_", "-").split("-", maxsplit=1)[0].lower()
    if code not in LANGUAGES:
        raise DataError(
            f"question {question.id}: metadata['language'] is {stated!r}, which language_consistency does not tell "
            f"apart; it knows {', '.join(LANGUAGES)}. Leave the reward out of this question's `rewards`"
        )
    return code


@lru_cache(maxsize=1024)
def _detected(text: str) -> str | None:
    return main_language(prose(text).open)
