import pytest

from megatron_r1.report.reflection import REFLECTIVE_WORDS, reflective_words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wait, that is WRONG. However, I will check", 4),
        ("butter waits, checked errors, rewrong, evaluates", 0),
        ("wait-wait\nbut", 3),
        ("", 0),
        (" ".join(REFLECTIVE_WORDS), 10),
    ],
)
def test_whole_words_in_any_case(text, count):
    assert reflective_words(text) == count
