"""The languages of words, on a labelled set of which one half was used to choose the constants; see data/README.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.reward.language import CHARACTERS_PER_WORD, LANGUAGES, main_language, word_counts
from megatron_r1.reward.prose import prose

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "languages.jsonl").read_text().splitlines()
]
SEVEN = {"en", "zh", "de", "fr", "es", "ja", "ru"}


def shares(text: str) -> dict[str, float]:
    counts = word_counts(prose(text).open)
    total = sum(counts.values())
    return {language: count / total for language, count in counts.items()}


def held_out(*kinds: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["half"] == "test" and row["kind"] in kinds]


def test_the_set_is_what_it_says() -> None:
    assert len(ROWS) >= 400
    assert len({row["text"] for row in ROWS}) == len(ROWS)
    assert {language for row in ROWS if row["kind"] == "plain" for language in row["shares"]} == SEVEN
    assert all(sum(row["shares"].values()) == pytest.approx(1, abs=1e-3) for row in ROWS)
    assert {language for row in ROWS for language in row["shares"]} <= set(LANGUAGES)


def test_the_language_of_a_sentence() -> None:
    rows = held_out("plain", "technical", "loan", "other")
    wrong = [row["text"] for row in rows if main_language(prose(row["text"]).open) not in row["shares"]]
    right = 1 - len(wrong) / len(rows)
    assert right >= 0.98, f"{right:.1%} of {len(rows)} held-out sentences are right; wrong: {wrong}"


def test_every_word_of_a_sentence_in_one_language() -> None:
    rows = held_out("plain", "technical")
    stray = [(row["text"], shares(row["text"])) for row in rows if shares(row["text"]) != row["shares"]]
    assert len(stray) <= 0.02 * len(rows), f"{len(stray)} of {len(rows)} have words of another language: {stray}"


def test_a_few_foreign_terms_do_not_break_a_sentence() -> None:
    found = {row["text"]: shares(row["text"]).get(*row["shares"], 0.0) for row in held_out("loan")}
    assert min(found.values()) >= 0.7, found


def test_shares_of_mixed_texts() -> None:
    rows = held_out("mixed")
    errors = [
        abs(shares(row["text"]).get(language, 0.0) - share) for row in rows for language, share in row["shares"].items()
    ]
    mean, worst = sum(errors) / len(errors), max(errors)
    assert mean <= 0.03, (
        f"mean absolute error of the share {mean:.3f}, worst {worst:.2f}, on {len(rows)} held-out texts"
    )
    assert worst <= 0.2


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", {}),
        ("42 + 7 = 49, x, y_1, n2, H2O, snake_case_name", {}),
        ("we add two and three", {"en": 5}),
        ("wir nutzen hier binary search, weil das viel schneller geht", {"de": 10}),
        ("we take the p\u0430per and read it", {"en": 6, "?": 1}),  # with a Cyrillic letter
        ("we_add_the_two_numbers", {"en": 5}),
        ("WeAddTheTwoNumbers", {"en": 5}),
        ("addTwoNumbers is what we call first", {"en": 5}),
        ("1234567890" * 9, {}),
        ("数列", {"zh": 2 / CHARACTERS_PER_WORD}),
        ("これは数列", {"ja": 5 / CHARACTERS_PER_WORD}),
        ("等式が成り立つ。確認。", {"ja": 9 / CHARACTERS_PER_WORD}),
        ("Это ответ", {"ru": 2}),
        ("답은 사십이다", {"ko": 2}),
        ("الجواب صحيح", {"?": 2}),
        ("Anna 比 Bob 大", {"zh": 2 / CHARACTERS_PER_WORD}),
    ],
)
def test_words(text: str, counts: dict[str, float]) -> None:
    assert word_counts(text) == pytest.approx(counts)


def test_a_repeated_phrase_counts_once() -> None:
    assert word_counts("we add two and three " * 50)["en"] <= 10
    assert word_counts("我们先求和。" * 50)["zh"] <= 15 / CHARACTERS_PER_WORD


@pytest.mark.parametrize("text", ["", "42", "x + y = z", "blorf zant quibbo dopwex"])
def test_no_language(text: str) -> None:
    assert main_language(text) is None
