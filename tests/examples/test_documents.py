"""What the miniature's base model reads: arithmetic checked by Python, languages by counting, prompts by name."""

import re
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from megatron_r1.config import component
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import heldout, texts
from megatron_r1.data.source import Document
from megatron_r1.reward.accuracy import math_score
from megatron_r1.reward.format import well_formed
from megatron_r1.reward.language_consistency import consistency
from megatron_r1.reward.response import extract_answer, split_reasoning
from tests.examples.loaded import DOCUMENTS, world

OPTIONS = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
SUMS = {"type": "reasoning_gym", "dataset": "chain_sum", "options": OPTIONS}
QUALITY = {"careful": 1.0, "checked": 1.0, "slip": 1.0}


def drawn(name: str, count: int = 200, exclude: frozenset[str] = frozenset(), **keys: Any) -> list[Document]:
    section = {"type": f"{DOCUMENTS}:{name}", "task": SUMS, "quality": QUALITY, **keys}
    source = component.build("source", section)
    return list(islice(source.documents(3, exclude), count))


def asked(document: Document) -> str:
    """The right answer to the last sum in the prompt, by Python's arithmetic."""
    return str(eval(re.findall(r"problem: ([\d +-]+) =", document.prompt)[-1]))


def equations(text: str) -> list[str]:
    return re.findall(r"-?\d+[+-]\d+=-?\d+", text)


def wrong(text: str) -> list[str]:
    return [equation for equation in equations(text) if not eval(equation.replace("=", "=="))]


@pytest.mark.parametrize(
    ("name", "layout"), [("Solved", "tags"), ("Chat", "after_think"), ("Reflective", "after_think")]
)
def test_answers_are_as_their_style_says(name: str, layout: Any) -> None:
    for document in drawn(name):
        reasoning, _ = split_reasoning(document.response)
        answer = extract_answer(document.response, layout)
        assert well_formed(document.response, layout)
        assert reasoning is not None
        right = math_score(asked(document), answer)
        style = document.style.rpartition(" ")[2]
        assert len(set(wrong(reasoning))) == (style != "careful")
        assert right == (style != "slip")


def test_guesses_are_seldom_right_and_bare_answers_have_no_tags() -> None:
    guesses = drawn("Solved", quality={"guess": 1.0})
    right = [math_score(asked(one), extract_answer(one.response)) for one in guesses]
    assert 5 < sum(map(bool, right)) < 50
    for one in drawn("Solved", quality={"bare": 1.0}):
        assert "<" not in one.response
        assert one.response.endswith(f" {asked(one)}")


@pytest.mark.parametrize(("speech", "low", "high"), [("en", 1, 1), ("zh", 0, 0), ("mixed", 0.3, 0.7)])
def test_language_of_traces(speech: str, low: float, high: float) -> None:
    shares = [consistency(split_reasoning(one.response)[0], "en") for one in drawn("Solved", speech={speech: 1.0})]
    assert low <= sum(shares) / len(shares) <= high


def test_language_says_nothing_about_quality() -> None:
    counts: Counter[tuple[bool, str]] = Counter()
    for one in drawn("Solved", 3000, speech={"en": 1.0, "zh": 1.0}):
        counts["first" in one.response, one.style] += 1
    for style in QUALITY:
        assert 0.42 < counts[True, style] / (counts[True, style] + counts[False, style]) < 0.58


def test_a_pair_has_one_manner() -> None:
    for one in drawn("Pairs"):
        example, line, _ = one.prompt.partition("\n")
        assert line
        assert ("Let me check" in example) == ("Let me check" in one.response) == ("readable" in one.style)
        assert bool(wrong(example)) == bool(wrong(one.response))


def test_rewriting_keeps_every_equation() -> None:
    for one in drawn("Rewritten", template="Rewrite: {reasoning} Clean:", speech={"mixed": 1.0}):
        assert equations(one.prompt) == equations(one.response)
        assert consistency(split_reasoning(one.response)[0], "en") == 1.0


def test_no_source_uses_heldout_questions() -> None:
    narrow = {**SUMS, "options": {**OPTIONS, "max_terms": 3}}
    kept_out = texts(heldout(TaskSection.model_validate({"task": narrow}), 500))
    for name in ("Solved", "Pairs", "Reflective"):
        text = " ".join(one.prompt for one in drawn(name, exclude=kept_out, task=narrow))
        assert not [question for question in kept_out if question in text], name


def test_talk_never_mentions_heldout_prompts_and_covers_the_others() -> None:
    quality = {"good": 1.0, "plain": 1.0, "curt": 1.0, "wrong": 1.0, "messy": 1.0}
    section = {"type": f"{DOCUMENTS}:Talk", "quality": quality, "layouts": {"plain": 1.0, "tagged": 1.0, "chat": 1.0}}
    found = list(islice(component.build("source", section).documents(5, frozenset()), 6000))
    prompts = {re.sub(r"^(?:User: |<｜User｜>)|(?: Assistant:|<｜Assistant｜>)$", "", one.prompt) for one in found}
    assert prompts == {text for text, ask in world.asks().items() if not ask.heldout}


def test_talk_of_better_quality_scores_higher() -> None:
    def mean(style: str) -> float:
        section = {"type": f"{DOCUMENTS}:Talk", "quality": {style: 1.0}, "layouts": {"tagged": 1.0}}
        found = list(islice(component.build("source", section).documents(5, frozenset()), 400))
        scores = []
        for one in found:
            ask = world.asks()[one.prompt.removeprefix("User: ").removesuffix(" Assistant:")]
            scores.append(world.rubric(ask, extract_answer(one.response) or ""))
        return sum(scores) / len(scores)

    good, plain, curt, wrong_ones = (mean(style) for style in ("good", "plain", "curt", "wrong"))
    assert good > plain > curt > wrong_ones
    assert good > 0.9
    assert wrong_ones < 0.3
