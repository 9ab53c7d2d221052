from fractions import Fraction

import pytest

from megatron_r1.reward.numerals import MAX_DIGITS, numeral, same, without_unit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-7", -7), ("+7", 7), ("007", 7), ("1,234,567", 1234567), ("1 234", 1234), ("2.50", Fraction(5, 2)),
        (".5", Fraction(1, 2)), ("5.", 5), ("3/4", Fraction(3, 4)), ("-3/4", Fraction(-3, 4)), ("6:4", Fraction(3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"\frac34", Fraction(3, 4)), (r"-\frac{-1}{2}", Fraction(1, 2)),
        (r"1\frac{1}{2}", Fraction(3, 2)), ("1 1/2", Fraction(3, 2)), (r"-1\frac{1}{2}", Fraction(-3, 2)),
        ("1.5e3", 1500), (r"2 \times 10^{-2}", Fraction(1, 50)), ("10^3", 1000), ("{7}", 7), ("(7)", 7), (r"\{7\}", 7),
        (r"0.1\overline{6}", Fraction(1, 6)), ("12%", 12),
    ],
)  # fmt: skip
def test_values(text: str, value: Fraction) -> None:
    number = numeral(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1 2",
        "1,23",
        "1,2",
        "1+1",
        "2^3",
        "1/0",
        "1/2/3",
        "--1",
        "1e401",
        "1e",
        "0x10",
        "3!",
        "9" * (MAX_DIGITS + 1),
    ],
)
def test_what_is_no_plain_number(text: str) -> None:
    assert numeral(text) is None


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("0.5", "1/2", True), ("1/3", "0.333333", True), ("1/3", "0.33333", False), ("0.333333", "0.3333334", True),
        ("1/3", "333333/1000000", False), ("0", "0.0000001", False), ("0.0000001", "0", False),
        ("50%", "0.5", True), ("50%", "50", True), ("0.5", "50%", True), ("50", "50%", True), ("50%", "5%", False),
        ("1234567.1", "1234567.2", False),
    ],
)  # fmt: skip
def test_equality(one: str, other: str, equal: bool) -> None:
    first, second = numeral(one), numeral(other)
    assert first is not None
    assert second is not None
    assert same(first, second) is equal


def test_units() -> None:
    assert [without_unit(text) for text in ("5 cm", "5km/h", "5 m^2", "5x", "5")] == ["5", "5", "5", "5x", "5"]
