import pytest
import sympy
from sympy import Abs, Eq, FiniteSet, Interval, Symbol, cos, exp, expand, log, oo, sin, sqrt

from megatron_r1.reward.refutation import refuted

X, Y = Symbol("x", real=True), Symbol("y", real=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((X + 1) ** 3, expand((X + 1) ** 3)),
        (sin(2 * X), 2 * sin(X) * cos(X)),
        (sqrt(12), 2 * sqrt(3)),
        (sympy.Integer(1) / 3, sympy.Float("0.333333")),
        (log(8, 2), sympy.Integer(3)),
        (sqrt((X - 5) ** 2), Abs(X - 5)),
        (exp(X + Y), exp(X) * exp(Y)),
        (sympy.Integer(5), Eq(X, 5)),
        (FiniteSet(1, sqrt(4)), FiniteSet(Eq(X, 2), Eq(X, 1))),
        (Interval.open(1, 2), FiniteSet(1, 2)),
        (Interval(0, oo), Interval(0, oo)),
    ],
)
def test_what_is_the_same_is_not_refuted(one: object, other: object) -> None:
    assert not refuted(one, other)
    assert not refuted(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X + 1, X + 2),
        (X, Y),
        (sqrt(12), sqrt(13)),
        (FiniteSet(1, 2), FiniteSet(1, 3)),
        (FiniteSet(1, 2), sympy.Integer(1)),
        (Interval(1, 2), sympy.Integer(1)),
        (X, (X + Y + 1) ** 99),
        (sympy.Integer(3), sympy.Pow(9, sympy.Pow(9, 9, evaluate=False), evaluate=False)),
        (sympy.Integer(3), exp(exp(exp(exp(100))), evaluate=False)),
    ],
)
def test_what_differs_is_refuted(one: object, other: object) -> None:
    assert refuted(one, other)


def test_what_has_no_value_is_left_to_others() -> None:
    assert not refuted(sympy.Function("f")(X), X + 1)
    assert not refuted(Eq(X, 1), Eq(X, 2))
    assert not refuted(X > 1, X + 1)
