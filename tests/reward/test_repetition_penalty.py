from typing import Any

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.reward.repetition_penalty import repeated_share, words
from tests.reward.shape_samples import score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("a b a b a b", -0.5),  # aba bab aba bab
        ("A b, a B; a b.", -0.5),  # case and punctuation do not make it new
        ("no no no no no no no no no no no no", -0.9),
    ],
)
def test_share_of_repeated_trigrams(text: str, expected: float) -> None:
    assert score("repetition_penalty", text) == [pytest.approx(expected)]


def test_size_and_penalty() -> None:
    assert score("repetition_penalty", "a b a b", ngram=1, max_penalty=-0.5) == [-0.25]
    assert score("repetition_penalty", "a b a b", max_penalty=0.0) == [0.0]


def test_chinese_is_cut_into_words() -> None:
    assert words("我们先计算质量。然后除以三!") == ["我们", "先", "计算", "质量", "然后", "除以", "三"]
    assert score("repetition_penalty", "我们计算质量。" * 10)[0] == pytest.approx(-(28 - 3) / 28)


@pytest.mark.parametrize("padding", ["ha" * 500, "!" * 1000, " \n" * 500, "_" * 1000, "\u200bno\u200b " * 500])
def test_padding_is_seen_without_spaces_or_words(padding: str) -> None:
    assert score("repetition_penalty", f"The answer is five because two and three make five. {padding}")[0] < -0.9


def test_short_rows_of_signs_are_no_words() -> None:
    assert words("a -> b; $x^{2}$ | -- |") == ["a", "b", "x", "2"]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "a b. a b, a b.", 0.0),  # punctuation sticks to the words
        ("en", "A b a B a b", -0.5),
        ("en", "one two", 0.0),
        ("zh", "我们 我们 我们 我们", -(5 - 2) / 5),  # spaces are pieces too
        ("zh", "", 0.0),
    ],
)
def test_open_r1(language: str, text: str, expected: float) -> None:
    [value] = score("repetition_penalty", text, compatible="open-r1", language=language)
    assert value == pytest.approx(expected)


@pytest.mark.parametrize("config", [{"max_penalty": 0.1}, {"ngram": 0}, {"language": "zh"}, {"compatible": "open-r1"}])
def test_settings_that_make_no_sense(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        score("repetition_penalty", **config)


def test_share_against_a_count_by_hand() -> None:
    assert repeated_share(list("abcabcabd"), 2) == pytest.approx(1 - 4 / 8)  # ab bc ca bd
