import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.data.overlap import Match, NgramIndex, bare, ngrams, words

SENTENCES = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Find\tx,\n if x^2 + 1 = 5!  ", "find x if x 2 1 5"),
        ("don't STOP—now", "don t stop now"),
        ("has_close_elements(nums)", "has close elements nums"),
        ("Ｆｕｌｌ ﬁve １２", "full five 12"),
        ("STRASSE straße", "strasse strasse"),
        ("soft\u00adhyphen zero\u200bwidth \u202eright", "softhyphen zerowidth right"),
        ("cafe\u0301 caf\u00e9", "café café"),
        ("क्या है", "क्या है"),
        ("求x的值。", "求 x 的 值"),
        ("ラーメン", "ラ ー メ ン"),
        ("ใจดี", "ใ จ ดี"),
        ("한국어 문장", "한국어 문장"),
        ("$\\frac{1}{2}$", "frac 1 2"),
        ("— … ∑ 🙂", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert words(text) == expected.split()


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_words_are_found_as_in_any_text(text: str) -> None:
    assert [*words(text), "é"] == words(text + " é")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 3 + 4?", " what is\n3+4? ", True),
        ("3 + 4", "3 - 4", False),
        ("x\u00b2", "x2", False),
        ("cafe\u0301", "CAF\u00c9", True),
        ("zero\u200bwidth", "zerowidth", True),
        ("∑", "∏", False),
    ],
)
def test_bare_texts_are_equal_for_copies_alone(one: str, other: str, same: bool) -> None:
    assert (bare(one) == bare(other)) == same


@pytest.mark.parametrize(
    ("parts", "expected"), [("a b c d", ["a b c", "b c d"]), ("a b c", ["a b c"]), ("a b", ["a b"]), ("", [])]
)
def test_ngrams(parts: str, expected: list[str]) -> None:
    assert list(ngrams(parts.split(), 3)) == expected


@given(SENTENCES, SENTENCES, st.integers(1, 4))
def test_a_match_is_a_run_of_words_in_both(text: str, indexed: str, n: int) -> None:
    """Against the definition: some run of n words of the one stands in the other."""
    index = NgramIndex(n)
    assert index.add(indexed, "set", 0) == bool(indexed)
    there = indexed.split()
    runs = [f" {' '.join(there[i : i + n])} " for i in range(len(there) - n + 1)]
    expected = any(run in f" {text} " for run in runs) or (bool(text) and len(there) < n and text == indexed)
    assert bool(index.matches(text)) == expected


def test_the_first_shared_words_of_each_group_are_named() -> None:
    index = NgramIndex(3)
    index.add("one two three four", "digits", 0)
    index.add("zero one two three", "digits", 1)
    index.add("two three four", "tail", 7)
    assert index.matches("Zero, one, two, three, four") == [
        Match("digits", 1, "zero one two"),
        Match("tail", 7, "two three four"),
    ]


def test_short_texts_match_only_as_a_whole() -> None:
    index = NgramIndex(10)
    index.add("What is 2 + 2?", "short", 0)
    assert index.matches("what is 2+2") == [Match("short", 0, "what is 2 2")]
    assert index.matches("Tell me: what is 2 + 2?") == []
    assert not index.add("?!", "short", 1)
    assert index.matches("…") == []


def test_a_copy_is_found_in_a_long_text_and_nothing_else() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{number}" for number in range(2000)]
    texts = [" ".join(rng.choices(vocabulary, k=80)) for _ in range(300)]
    index = NgramIndex(10)
    for row, text in enumerate(texts):
        index.add(text, "set", row)
    assert len(index) == 300 * 71
    fresh = [[f"v{rng.randrange(2000)}" for _ in range(80)] for _ in range(300)]
    assert not any(index.matches(" ".join(parts)) for parts in fresh)
    for row, parts in enumerate(fresh):
        start = rng.randrange(70)
        parts[40:40] = texts[row].split()[start : start + 10 - row % 2]
        found = index.matches(" ".join(parts))
        assert [match.row for match in found] == ([] if row % 2 else [row])
