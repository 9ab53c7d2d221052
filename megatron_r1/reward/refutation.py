"""Answers that cannot be right, found by numbers alone.

Symbolic comparison takes sympy from milliseconds to forever, most of all on what is different. Two expressions that
are the same have the same value wherever their variables stand, so one point where they clearly differ settles it.
"""

import zlib
from typing import Any

import mpmath
import sympy
from sympy.logic.boolalg import And

MAX_LOG = 1e6
"""Natural logarithm of the largest number that is worked out; beyond it only equal texts are equal."""
_CLEARLY = 1e-4
_FUNCTIONS = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "exp": mpmath.exp, "Abs": abs, "sqrt": mpmath.sqrt,
    "asin": mpmath.asin, "acos": mpmath.acos, "atan": mpmath.atan,
    "sinh": mpmath.sinh, "cosh": mpmath.cosh, "tanh": mpmath.tanh,
}  # fmt: skip


class _UnknownError(Exception):
    """The value of an expression is not known."""


class _TooLargeError(Exception):
    """A number that nobody would work out."""


def refuted(expected: Any, found: Any) -> bool:
    """True where `found` is certainly another object than `expected`; False says nothing."""
    expected, found = _unwrapped(expected, found)
    ours, theirs = _elements(expected), _elements(found)
    if ours is None or theirs is None:
        return False
    if len(ours) != len(theirs):
        return True
    return any(all(_differ(mine, other) for mine in ours) for other in theirs)


def _unwrapped(expected: Any, found: Any) -> tuple[Any, Any]:
    """Both without the `x =` that only one of them has."""
    if _is_equation(found) != _is_equation(expected):
        return _last_side(expected), _last_side(found)
    return expected, found


def _is_equation(value: Any) -> bool:
    links = value.args if isinstance(value, And) else [value]
    return bool(links) and all(isinstance(link, sympy.Eq) for link in links)


def _last_side(value: Any) -> Any:
    if not _is_equation(value):
        return value
    return value.args[-1].rhs if isinstance(value, And) else value.rhs


def _elements(value: Any) -> list[Any] | None:
    """What a number, tuple, finite set or interval consists of, None for other kinds."""
    if isinstance(value, sympy.FiniteSet | sympy.Tuple):
        return [_last_side(element) for element in value.args]
    if isinstance(value, sympy.Interval):
        return [value.start, value.end]
    return [value] if isinstance(value, sympy.Expr) else None


def _differ(expected: Any, found: Any) -> bool:
    if not (isinstance(expected, sympy.Expr) and isinstance(found, sympy.Expr)):
        return False
    if expected == found:
        return False
    try:
        with mpmath.workprec(80):
            mine = _value(expected)
            other = _value(found)
            if not (mpmath.isfinite(mine) and mpmath.isfinite(other)):
                return False
            scale = abs(mine) + abs(other)
            # 50 may be the answer to 50% and the other way round.
            apart = [abs(mine - other * factor) for factor in (1, 100, mpmath.mpf("0.01"))]
            return min(apart) > _CLEARLY * scale + 1e-5
    except _TooLargeError:
        return True
    except (_UnknownError, ArithmeticError, ValueError, mpmath.libmp.NoConvergence):
        return False


def _value(node: Any) -> Any:
    """Of an expression at the point of `_coordinate`."""
    if isinstance(node, sympy.Symbol):
        return _coordinate(node.name)
    if isinstance(node, sympy.Rational):
        return mpmath.mpf(node.p) / node.q
    if isinstance(node, sympy.Float):
        return mpmath.mpf(str(node))
    if node in _CONSTANTS:
        return _CONSTANTS[node]
    arguments = [_value(argument) for argument in node.args]
    if isinstance(node, sympy.Add):
        return mpmath.fsum(arguments)
    if isinstance(node, sympy.Mul):
        return mpmath.fprod(arguments)
    if isinstance(node, sympy.Pow):
        return _power(*arguments)
    if isinstance(node, sympy.UnevaluatedExpr):
        return arguments[0]
    if isinstance(node, sympy.log):
        return mpmath.log(*arguments)
    function = _FUNCTIONS.get(type(node).__name__)
    if function is None or len(arguments) != 1:
        raise _UnknownError
    if function in (mpmath.exp, mpmath.sinh, mpmath.cosh, mpmath.sin, mpmath.cos, mpmath.tan):
        _bounded(arguments[0])
    return function(arguments[0])


_CONSTANTS = {sympy.pi: mpmath.pi + 0, sympy.E: mpmath.e + 0, sympy.I: mpmath.mpc(0, 1)}


def _power(base: Any, exponent: Any) -> Any:
    if base != 0:
        _bounded(mpmath.log(abs(base)) * exponent)
    return mpmath.power(base, exponent)


def _bounded(logarithm: Any) -> None:
    if abs(logarithm) > MAX_LOG:
        raise _TooLargeError


def _coordinate(name: str) -> Any:
    """A positive number for each name; two names never share one."""
    return mpmath.mpf(zlib.crc32(name.encode()) % 1_000_003) / 1_000_003 + mpmath.mpf("0.31")
