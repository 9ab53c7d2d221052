r"""Plain numbers as they are written in answers: integers, decimals, fractions, percentages, powers of ten."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Digits of a numeral that is read as a number; longer ones are only compared as text."""
MAX_POWER = 400
"""Largest power of ten in scientific notation."""
_RELATIVE = Fraction(1, 10**5)

_PLAIN = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DIGITS = re.compile(rf"(?:{_PLAIN})")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_FRAC = re.compile(r"\\frac\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))")
_RATIO = re.compile(r"([\d.,]+)\s*[/:]\s*([\d.,]+)")
_MIXED = re.compile(r"(\d+)\s*(\\frac.*)|(\d+)\s+(\d+\s*/\s*\d+)")
_SCIENTIFIC = re.compile(
    rf"(?:({_PLAIN})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*\{{?\s*([-+]?\d+)\s*\}}?|({_PLAIN})[eE]([-+]?\d+)"
)
_PERCENT = re.compile(r"(?i)\s*(?:%|percent|per cent|pct)$")
_UNIT = re.compile(
    r"\s*(?:(?:[aApP]\.?[mM]|[cdkm]?m|[mk]?g|[mcd]?[lL]|k?[JNWVPA]|k?Hz|mol|in|ft|yd|mi|lbs?|oz|h|hr|min|m?s|mph|[CF])"
    r"(?:\s*\^\s*\{?[-\d]\}?)?)?(?:\s*/\s*(?:[ck]?m|s|h|hr|min)(?:\s*\^\s*\{?\d\}?)?)?$"
)
_BRACKETS = [("{", "}"), (r"\{", r"\}"), ("(", ")"), ("[", "]")]


@dataclass(frozen=True)
class Numeral:
    """A number as written."""

    value: Fraction
    """With the percent sign left aside."""
    decimal: bool = False
    """Written with a decimal point, so it may be rounded."""
    percent: bool = False


def numeral(text: str) -> Numeral | None:
    """The number that tidy `text` writes down, or None where it is anything that has to be computed first."""
    text = _bare(text)
    without = _PERCENT.sub("", text)
    percent = without != text
    sign = -1 if without.startswith("-") else 1
    value = _unsigned(_bare(without[1:]) if without[:1] in ("-", "+") else without)
    return (
        None
        if value is None
        else Numeral(sign * value, decimal="." in text and "overline" not in text, percent=percent)
    )


def _bare(text: str) -> str:
    text = text.strip()
    for left, right in _BRACKETS:
        if text.startswith(left) and text.endswith(right):
            text = text[len(left) : len(text) - len(right)].strip()
    return text


def without_unit(text: str) -> str:
    """`5 cm^2` as `5`; only sound where a letter cannot be a variable."""
    return _UNIT.sub("", text)


def same(reference: Numeral, answer: Numeral) -> bool:
    """Whether two numerals write the same number.

    Where one has a decimal point they have to agree in 6 decimals (as in math-verify) and also to one part in 10^5,
    so that 0 is not 0.0000001. A percent sign may be left out or be computed: 50%, 0.5 and 50 all answer "50%", and
    50% answers both 50 and 0.5; what was asked for decides which of them is sensible, and that is not known here.
    """
    candidates = [answer.value]
    if reference.percent != answer.percent:
        candidates.append(answer.value / 100 if answer.percent else answer.value * 100)
    rounded = reference.decimal or answer.decimal
    return any(value == reference.value or (rounded and _close(reference.value, value)) for value in candidates)


def _close(reference: Fraction, value: Fraction) -> bool:
    return round(reference, 6) == round(value, 6) and abs(value - reference) <= _RELATIVE * abs(reference)


def _unsigned(text: str) -> Fraction | None:
    if sum(character.isdigit() for character in text) > MAX_DIGITS:
        return None
    if _DIGITS.fullmatch(text):
        return Fraction(text.replace(",", "").replace(" ", ""))
    if parts := _REPEATING.fullmatch(text):
        before, digits, repeated = parts[1] or "0", parts[2], parts[3]
        whole = int(before + digits + repeated) - int(before + digits)
        return Fraction(whole, (10 ** len(repeated) - 1) * 10 ** len(digits))
    if parts := _FRAC.fullmatch(text):
        return _quotient(parts[1] or parts[2], parts[3] or parts[4])
    if parts := _RATIO.fullmatch(text):
        return _quotient(parts[1], parts[2])
    if parts := _MIXED.fullmatch(text):
        fraction = _unsigned(parts[2] or parts[4])
        return None if fraction is None else int(parts[1] or parts[3]) + fraction
    if parts := _SCIENTIFIC.fullmatch(text):
        power, factor = parts[2] or parts[4], parts[1] or parts[3] or "1"
        if len(power) <= 4 and abs(int(power)) <= MAX_POWER:
            return Fraction(factor.replace(",", "").replace(" ", "")) * Fraction(10) ** int(power)
    return None


def _quotient(above: str, below: str) -> Fraction | None:
    top, bottom = numeral(above), numeral(below)
    return None if top is None or bottom is None or bottom.value == 0 else top.value / bottom.value
