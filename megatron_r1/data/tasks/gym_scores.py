"""Where reasoning-gym's own scorer would run or reward what is no answer, a stricter one.

Found by giving every dataset the same hostile answers (`tests/data/tasks/test_gym_scores.py`), in version 0.1.25:

* some scorers pass the answer to `eval`, or to sympy's `parse_expr`, which does the same: any code would run;
* `puzzle24` never looks at which numbers an expression uses, and cuts its value to an integer;
* `coin_flip` gives 1 to any prefix of the right decimals, such as `0`, and to whatever is within 0.0001;
* `complex_arithmetic` gives 1 to `nan`, `game_of_life_halting` to any text where the answer is True;
* `intermediate_integration` gives 1 to the question itself, written as `Integral(...)`.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Entry = dict[str, Any]
Scorer = Callable[[str, Entry], float]

_LONGEST = 10_000
"""Characters of the longest answer that is parsed."""
_PROBABILITY = re.compile(r"\d{0,20}\.?\d{1,40}(e-\d{1,2}|/[1-9]\d{0,20})?")
_FORMULA = re.compile(r"[0-9a-zA-Z.+\-*/^(),\s]*")
_ATTRIBUTE = re.compile(r"\.\s*[a-zA-Z]")
_FUNCTION = re.compile("a?(sin|cos|tan|sec|csc|cot)h?|exp|log|ln|sqrt|pi|erfi?|Abs")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def score(dataset: str, scorer: Scorer, answer: str, entry: Entry) -> float:
    """Score of an answer, from 0 to 1. One that the dataset's scorer stumbles over is a wrong one."""
    if len(answer) > _LONGEST:
        return 0.0
    try:
        if dataset in _OWN:
            return float(_OWN[dataset](answer.strip(), entry))
        allowed = _GATES.get(dataset)
        found = float(scorer(answer, entry)) if allowed is None or allowed(answer, entry) else 0.0
    except Exception:  # whatever a parser raises
        return 0.0
    return found if 0 <= found <= 1 else 0.0  # a nan is neither


def _uses_the_numbers(answer: str, entry: Entry) -> bool:
    """An expression of + - * / over exactly the given numbers, whose value is the target."""
    numbers: list[int] = []
    value = _value(ast.parse(answer, mode="eval").body, numbers)
    metadata = entry["metadata"]
    return sorted(numbers) == sorted(metadata["numbers"]) and value == metadata.get("target", 24)


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    """Exact value of an expression; the integers in it are added to `numbers`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, numbers)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _is_the_probability(answer: str, entry: Entry) -> bool:
    """Right to four decimals, and to a hundredth of itself: 0 is never near enough to what is small."""
    exact = Fraction(entry["metadata"]["rational"]["numerator"], entry["metadata"]["rational"]["denominator"])
    tolerance = min(Fraction(1, 10_000), exact / 100)
    return (
        bool(_PROBABILITY.fullmatch(answer)) and abs(Fraction(*map(Fraction, answer.split("/"))) - exact) <= tolerance
    )


def _is_the_word(answer: str, entry: Entry) -> bool:
    return answer.lower() == str(entry["answer"]).lower()


def _is_a_formula(answer: str, entry: Entry) -> bool:
    """Numbers, operators, one-letter variables and functions of analysis: nothing that `eval` could be harmed by."""
    names = re.findall("[a-zA-Z]+", answer)
    harmless = all(len(name) == 1 or _FUNCTION.fullmatch(name) for name in names)
    return bool(_FORMULA.fullmatch(answer)) and not _ATTRIBUTE.search(answer) and harmless


def _is_a_literal(answer: str, entry: Entry) -> bool:
    """The right text, which is compared before anything is evaluated, or a list that evaluates to itself."""
    known = [entry["answer"], *entry["metadata"].get("valid_answers", [])]
    if answer in known or answer.strip() == entry["answer"].strip():
        return True
    ast.literal_eval(answer)
    return True


def _is_no_nan(answer: str, entry: Entry) -> bool:
    return "nan" not in answer.lower()


_OWN: dict[str, Callable[[str, Entry], bool]] = {
    "puzzle24": _uses_the_numbers,
    "countdown": _uses_the_numbers,
    "coin_flip": _is_the_probability,
    "game_of_life_halting": _is_the_word,
}
_GATES: dict[str, Callable[[str, Entry], bool]] = {
    "binary_matrix": _is_a_literal,
    "n_queens": _is_a_literal,
    "spiral_matrix": _is_a_literal,
    "string_insertion": _is_a_literal,
    "intermediate_integration": _is_a_formula,
    "polynomial_multiplication": _is_a_formula,
    "simple_integration": _is_a_formula,
    "complex_arithmetic": _is_no_nan,
}
