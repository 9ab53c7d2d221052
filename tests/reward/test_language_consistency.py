from typing import Any

import pytest

from megatron_r1.config import component
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Group, Question, Sample
from tests.reward.shape_samples import score, thought

ENGLISH = "First we add the two numbers, and then we divide the sum by four."
GERMAN = "Zuerst addieren wir die Zahlen, und dann teilen wir die Summe durch vier."


def consistency(reasoning: str, target: str = "en") -> Any:
    return score("language_consistency", thought(reasoning), language=target)[0]


def test_share_of_the_target_language() -> None:
    assert consistency(ENGLISH) == 1.0
    assert consistency(GERMAN) == 0.0
    assert consistency(f"{ENGLISH} {GERMAN}") == pytest.approx(14 / 27)
    assert consistency(f"{ENGLISH} 我们先把两个数加起来再除以四。") == pytest.approx(14 / (14 + 14 / 1.7))


def test_formulas_code_and_numbers_do_not_count() -> None:
    code = "```python\nfor value in values:\n    total += value  # the sum\n```"
    assert consistency(f"{GERMAN} $\\frac{{a}}{{b}} = 3$ `total / count` 17.5 \\alpha\n{code}", "de") == 1.0


@pytest.mark.parametrize("text", ["", "5", "<answer>5</answer>", thought(""), thought(" \n"), thought("..., !")])
def test_without_reasoning(text: str) -> None:
    assert score("language_consistency", text, language="en") == [0.0]


def test_reasoning_without_words() -> None:
    assert consistency("$2 + 3 = 5$") == 1.0
    assert consistency("2 + 3 = 5") == 1.0


def test_only_the_reasoning_counts_and_it_need_not_be_closed() -> None:
    texts = [f"<think>{ENGLISH}</think> {GERMAN}", f"<think>{ENGLISH}", f"<think>{GERMAN}</think> {ENGLISH}"]
    assert score("language_consistency", *texts, language="en") == [1.0, 1.0, 0.0]


def test_reasoning_that_the_template_opened() -> None:
    group = Group(Question("0", "none", "q <think>\n", "5"), [], [Sample([], [], f"{ENGLISH}</think> 5", True, 0)])
    assert component.build("reward", {"type": "language_consistency", "language": "en"})(group) == [1.0]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"language": "de"}, 1.0),
        ({"language": "de-AT", "text": ENGLISH}, 1.0),
        ({"text": "Wie viele Primzahlen sind kleiner als $n = 100$?"}, 1.0),
        ({"text": "How many primes are smaller than 100?"}, 0.0),
        ({"text": "100以下有多少个质数？"}, 0.0),
        ({"text": "$2 + 3 = ?$"}, None),
        ({}, None),
    ],
)
def test_the_language_of_the_question(metadata: dict[str, Any], expected: float | None) -> None:
    assert score("language_consistency", thought(GERMAN), metadata=metadata) == [expected]


def test_the_run_s_language_comes_first() -> None:
    assert score("language_consistency", thought(GERMAN), metadata={"language": "de"}, language="en") == [0.0]


def test_languages_that_are_not_told_apart() -> None:
    with pytest.raises(DataError, match=r"q-1: metadata.*'tlh'"):
        score("language_consistency", thought(GERMAN), metadata={"language": "tlh"})
    with pytest.raises(ConfigError, match="tlh"):
        score("language_consistency", language="tlh")
