r"""Expressions, equations, sets, intervals and matrices: what math-verify compares, behind guards.

math-verify parses leniently and lets sympy compute, which a policy would find out: `\int_0^3 1 dx`, `x=4=3` and
`3\text{ or 4}` all equal 3 there, `3 4` is 7, `2x+3t` is `2x+3` (t for tonnes), and `9^{9^{9^9}}` never ends.
"""

import logging
import math
import re
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from math_verify import LatexExtractionConfig
from math_verify.grader import is_assignment_relation
from math_verify.parser import NormalizationConfig
from sympy.core.relational import Relational
from sympy.logic.boolalg import And

from megatron_r1.reward.refutation import refuted

MAX_LENGTH = 500
"""Characters of an answer that is parsed; four times the reference where that is longer."""
MAX_NESTING = 10
"""Brackets within brackets; the parser takes twice as long for each."""
MAX_DIGITS = 60
"""Of one number inside an expression."""
MAX_EXPONENT = 10_000
"""A numeral as exponent, and the product of those that stand on brackets; no numeral stands on another."""
MAX_FACTORIAL = 1000
"""Of what stands before a `!` or in a binomial."""
MAX_BARS = 8
"""Of absolute values."""
MAX_RELATION = 40
"""Operations in an equation or inequality, which has to be solved where it is not that of the reference."""

_KNOWN = re.compile(
    r"frac|sqrt|pm|mp|cdot|times|div|le|leq|ge|geq|lt|gt|ne|neq|infty|cup|cap|in|notin|setminus|subset|"
    r"subseteq|emptyset|varnothing|mathbb|mathbf|vec|hat|bar|text|lfloor|rfloor|lceil|rceil|langle|rangle|"
    r"lbrace|rbrace|begin|end|binom|dbinom|tbinom|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|"
    r"log|ln|lg|exp|alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|"
    r"xi|pi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|"
    r"ell|approx|simeq|i"
)
"""LaTeX commands that leave nothing to be computed which a reference would not have."""
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_BARE = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|log|ln|exp|pi|infty|alpha|beta|theta)"
    r"(?![A-Za-z])"
)
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq)(?![A-Za-z])")
_DECIMAL = re.compile(r"-?\d{0,12}\.\d{1,12}")
_NAME = re.compile(r"\s*(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?|\([^()]*\))?\s*")
_BASE = re.compile(r"\d\s*_\s*\{?\s*(\w+)")
_TWO_NUMBERS = re.compile(r"\d\s+[\d.]|\d\s*\\(?:boxed|phantom)")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1},}}")
_EXPONENT = re.compile(r"([)}\]]?)\s*\^\s*\{?\s*\(?\s*[-+]?\s*(\d+)")
_TOWER = re.compile(r"\^\s*[{(][\s({]*[-+]?\d+[\s)}]*(?:\^[\s({]*\d|!|\\cdot|\\times|\*)|\^\s*\d+\s*[\^!]")
_THREE_STOREYS = re.compile(r"\^\s*\{[^}]*\^\s*\{[^}]*\^")
_FACTORIAL = re.compile(r"(\d+)\s*[!}]")
_TO_BE_WORKED_OUT = (sympy.Derivative, sympy.Integral, sympy.Limit, sympy.Sum, sympy.Product)
_SETTINGS = LatexExtractionConfig(
    try_extract_without_anchor=False,
    boxed_match_priority=0,
    # Without units: math-verify would take the t of 2x+3t for one.
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last"
    ),
)
# It says for every sample that its time limit is off: the judge ends the whole worker instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    """The sympy object that tidy LaTeX stands for, or None."""
    text = _BARE.sub(r"\\\1", exact(text))
    if text.count(":") > 1:  # which math-verify divides: 1:2:3 is a triple
        text = f"({text.replace(':', ',')})"
    found = math_verify.parse(rf"\boxed{{{text}}}", [_SETTINGS], fallback_mode="no_fallback", parsing_timeout=None)
    return _solutions(found[0]) if found else None


def equal(reference: str, answer: str) -> bool:
    """Whether two tidy LaTeX texts stand for the same mathematical object; the reference has been parsed before."""
    if not readable(answer, reference):
        return False
    expected, found = _aligned(parse(reference), parse(answer))
    if found is None or _postpones(found, expected) or refuted(expected, found) or not _consistent(found, expected):
        return False
    if expected != found and _is_relation(found) and _is_relation(expected) and not _solvable(expected, found):
        return False
    # The reference first: math-verify unwraps the answer to the form of the reference, not the other way round.
    same = math_verify.verify(expected, found, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same) and not _lost_in_rounding(expected, found)


def is_set(text: str) -> bool:
    """Whether the order of what `text` lists does not matter."""
    return isinstance(parse(text), sympy.FiniteSet)


def readable(answer: str, reference: str) -> bool:
    """Whether an answer is worth parsing: within the limits above, and made of what the reference is made of."""
    if not answer.isascii() or len(answer) > max(MAX_LENGTH, 4 * len(reference)) or _nesting(answer) > MAX_NESTING:
        return False
    unusual = {name for name in _COMMAND.findall(answer) if not _KNOWN.fullmatch(name)}
    if not unusual <= set(_COMMAND.findall(reference)):
        return False
    if not set(_BASE.findall(answer)) <= set(_BASE.findall(reference)) or answer.count(":") != reference.count(":"):
        return False  # math-verify reads 1011_3 as 1011
    if (
        _TWO_NUMBERS.search(answer)
        or _LONG_NUMBER.search(answer)
        or _TOWER.search(answer)
        or _THREE_STOREYS.search(answer)
    ):
        return False
    if answer.count("|") > MAX_BARS or answer.count(r"\cup") > MAX_NESTING or "{{{" in answer.replace(" ", ""):
        return False
    exponents = [(bracket, int(digits)) for bracket, digits in _EXPONENT.findall(answer)]
    if any(power > MAX_EXPONENT for _, power in exponents):
        return False
    if math.prod(power for bracket, power in exponents if bracket and power) > MAX_EXPONENT:
        return False
    if "!" not in answer and "binom" not in answer:
        return True
    if re.search(r"[!)}]\s*!", answer) or ("binom" in answer and "^" in answer):
        return False
    return all(int(n) <= MAX_FACTORIAL for n in _FACTORIAL.findall(answer))


def exact(text: str) -> str:
    r"""`\frac{1}{3} \approx 0.333` without its approximation; of `x \approx 0.333` the number."""
    head, *rest = _APPROXIMATELY.split(text)
    if not rest:
        return text
    return rest[0] if _NAME.fullmatch(head) or not head.strip() else head


def rounded(text: str) -> str:
    r"""The decimal of `4\pi \approx 12.57` where it is the other side, rounded; what `exact` says where it is not."""
    sides = _APPROXIMATELY.split(text)
    head, decimal = sides[0].rpartition("=")[2], sides[-1].strip()
    if len(sides) == 2 and _DECIMAL.fullmatch(decimal) and readable(head, ""):
        value = parse(head)
        places = len(decimal.partition(".")[2])
        if getattr(value, "is_number", False) and abs(value.evalf(15) - sympy.Float(decimal)) <= 0.51 * 10.0**-places:
            return decimal
    return exact(text)


def _nesting(text: str) -> int:
    """How deep brackets stand in brackets; beyond all limits where braces do not match."""
    depth = deepest = braces = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        braces += (character == "{") - (character == "}")
        deepest = max(deepest, depth, -braces * MAX_LENGTH)
    return deepest if braces == 0 else MAX_LENGTH


def _postpones(found: Any, expected: Any) -> bool:
    """Whether an answer leaves something to be worked out that the reference does not."""
    return any(found.has(kind) and not expected.has(kind) for kind in _TO_BE_WORKED_OUT)


def _aligned(expected: Any, found: Any) -> tuple[Any, Any]:
    """Both, and `x = 1, y = 2` as `(1, 2)` where the other is one: math-verify would compare them as sets."""
    if isinstance(found, sympy.Tuple | sympy.Interval):
        return _by_name(expected), found
    if isinstance(expected, sympy.Tuple | sympy.Interval):
        return expected, _by_name(found)
    return expected, found


def _by_name(value: Any) -> Any:
    parts = value.args if isinstance(value, sympy.FiniteSet) else ()
    if not parts or not all(isinstance(part, sympy.Eq) and part.lhs.is_Symbol for part in parts):
        return value
    values = {part.lhs.name: part.rhs for part in parts}
    return sympy.Tuple(*(values[name] for name in sorted(values))) if len(values) == len(parts) > 1 else value


def _solutions(value: Any) -> Any:
    """`x < 2, x > 3` as a union; where the inequalities leave something in common they hold together."""
    parts = value.args if isinstance(value, sympy.FiniteSet) and len(value.args) <= MAX_NESTING else ()
    links = [link for part in parts for link in (part.args if isinstance(part, And) else [part])]
    if len(parts) < 2 or not all(_is_ray(link) for link in links) or len(value.free_symbols) != 1:
        return value
    sets = [part.as_set() for part in parts]
    common = sympy.Intersection(*sets)
    return sympy.Union(*sets) if common is sympy.S.EmptySet else common


def _is_ray(link: Any) -> bool:
    return (
        isinstance(link, Relational)
        and not isinstance(link, sympy.Eq)
        and any(side.is_Symbol and other.is_number for side, other in (link.args, link.args[::-1]))
    )


def _is_relation(value: Any) -> bool:
    return isinstance(value, And | Relational)


def _solvable(expected: Any, found: Any) -> bool:
    return bool(expected.free_symbols == found.free_symbols and found.count_ops() <= MAX_RELATION)


def _consistent(found: Any, expected: Any) -> bool:
    """False for `x = 4 = 3` and, where no equation was asked for, `4 = 3`: math-verify reads the last side alone."""
    if isinstance(found, sympy.FiniteSet | sympy.Tuple):
        parts = list(expected.args) if isinstance(expected, sympy.FiniteSet | sympy.Tuple) else [expected]
        return all(_consistent(part, parts[0] if parts else None) for part in found.args)
    chain = list(found.args) if isinstance(found, And) else [found]
    if not all(isinstance(link, sympy.Eq) for link in chain):
        return True
    links = [(link.lhs, link.rhs) for link in chain]
    if len(links) == 1 and (isinstance(expected, sympy.Eq) or is_assignment_relation(found)):
        return True
    ends = [right for _, right in links]
    # What stands first may be a name; every other side has to have the value of the last.
    sides = [side for link in links for side in link if side in ends or side.is_number]
    return all(math_verify.verify(sides[-1], side, timeout_seconds=None) for side in sides)


def _lost_in_rounding(expected: Any, found: Any) -> bool:
    """math-verify rounds to 6 decimals, where 10^{-7} is 0."""
    if not (getattr(expected, "is_number", False) and getattr(found, "is_number", False)):
        return False
    size = abs(expected.evalf(15))
    if not (size.is_comparable and size < 1e-3):
        return False
    ratios = [abs(found.evalf(15) * scale - expected.evalf(15)) for scale in (1, 100, 0.01)]
    return bool(min(ratios) > 1e-5 * size)
