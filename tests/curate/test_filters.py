from typing import Any

import pytest

from megatron_r1.config.collect import FiltersSection
from megatron_r1.curate.filters import FILTERS, Reading, active, fault
from megatron_r1.types import Question
from tests.curate.speaking import FAULTS, THOUGHT

ALL = FiltersSection.model_validate(
    {
        "well_formed": "tags",
        "length": {"min_tokens": 10, "max_tokens": 500},
        "code_blocks": True,
        "long_paragraphs": {"max_characters": 300},
        "repetition": {},
        "mixed_language": {},
    }
)


def reading(reasoning: str, after: str = " <answer>5</answer>", **changes: Any) -> Reading:
    question = Question("q", "math", "2 + 3 =", "5", {"text": changes.pop("question", "What is the sum of 2 and 3?")})
    values: dict[str, Any] = {
        "question": question,
        "response": f"<think>{reasoning}</think>{after}",
        "finished": True,
        "tokens": 100,
    }
    return Reading(**(values | changes))


GOOD = [
    THOUGHT,
    f"{THOUGHT}\nThen I say what has come of it.",
    "So we have $x^2 + 3x = 4$, and `print(1)` would say the same.",
    "Wait, let me check that again: 2 + 3 = 5. Yes, that is right.",
    "The word Schadenfreude is German, and still this sentence is an English one.",
    "\n".join(f"Line {number} is short." for number in range(60)),
]
BAD: list[tuple[str, Reading]] = [
    ("truncated", reading(THOUGHT, finished=False)),
    ("broken_characters", reading(f"{THOUGHT} \ufffd")),
    ("broken_characters", reading(f"{THOUGHT} \x00")),
    ("well_formed", reading(THOUGHT, "5")),
    ("well_formed", reading(THOUGHT, " <answer>5</answer> <answer>6</answer>")),
    ("well_formed", reading("")),
    ("length", reading(THOUGHT, tokens=9)),
    ("length", reading(THOUGHT, tokens=501)),
    ("code_blocks", reading(f"{THOUGHT}\n~~~\ncode\n")),
    ("code_blocks", reading("Let me run it: ```print(1)``` gives 1.")),
    ("mixed_language", reading("Ich zähle einfach von der ersten Zahl an weiter, bis die zweite erreicht ist.")),
    *[(name, reading(text)) for name, text in FAULTS.items()],
]


@pytest.mark.parametrize("text", GOOD)
def test_good_reasoning_passes_all_filters(text: str) -> None:
    assert fault(reading(text), ALL) is None


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_each_fault_is_found_by_its_filter_alone(name: str, bad: Reading) -> None:
    found = fault(bad, ALL)
    assert found is not None
    assert found[0] == name
    off = {"truncated": False, "broken_characters": False, "code_blocks": False}.get(name)
    assert fault(bad, ALL.model_copy(update={name: off})) is None


def test_every_filter_is_tried_and_has_a_key() -> None:
    assert {name for name, _ in BAD} == set(FILTERS) == set(FiltersSection.model_fields)
    assert active(ALL) == list(FILTERS)
    assert active(FiltersSection()) == ["truncated", "broken_characters"]


def test_filters_of_the_reasoning_let_plain_answers_pass() -> None:
    plain = reading("", response="Bonjour, voici du code que vous avez voulu: ```print(1)```" + " word" * 100)
    section = ALL.model_copy(update={"well_formed": None, "repetition": None})
    assert fault(plain, section) is None


@pytest.mark.parametrize(
    ("question", "language", "passes"),
    [
        ("Wie viel ist die Summe von zwei und drei?", None, True),
        ("What is the sum of two and three?", None, False),
        ("What is the sum of two and three?", "de", True),
        ("2 + 3", None, True),  # no language of its own: that of the reasoning
    ],
)
def test_the_language_that_reasoning_is_measured_by(question: str, language: str | None, passes: bool) -> None:
    german = reading("Ich zähle einfach von der ersten Zahl an weiter, bis die zweite da ist.", question=question)
    section = FiltersSection.model_validate({"mixed_language": {"language": language}})
    assert (fault(german, section) is None) == passes


def test_shares_and_bounds_are_inclusive() -> None:
    ten = reading("one two three four five six seven eight nine ten", "")
    repeated = reading("one two one two", "", response="one two one two")  # 3 bigrams, 2 distinct
    third = FiltersSection.model_validate({"repetition": {"ngram": 2, "max_share": 1 / 3 + 1e-9}})
    less = FiltersSection.model_validate({"repetition": {"ngram": 2, "max_share": 0.33}})
    assert fault(repeated, third) is None
    assert fault(repeated, less) == ("repetition", "0.333 of the n-grams")
    exact = FiltersSection.model_validate({"long_paragraphs": {"max_characters": len(ten.reasoning)}})
    short = FiltersSection.model_validate({"long_paragraphs": {"max_characters": len(ten.reasoning) - 1}})
    assert fault(ten, exact) is None
    assert fault(ten, short) == ("long_paragraphs", f"{len(ten.reasoning)} characters")
