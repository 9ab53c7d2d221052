"""The tests of a code question, as an executor wants them."""

import json

from megatron_r1.config.code_tests import CallTest, CodeTests
from megatron_r1.config.load import validate
from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Question


def read_tests(question: Question) -> CodeTests | None:
    """The question's tests; None where it has none.

    Raises:
        DataError: they do not have the form above.
    """
    section = question.metadata.get("tests")
    if not section:
        return None
    try:
        tests = validate(CodeTests, section, where=f"the tests of question {question.id}")
    except ConfigError as error:
        raise DataError(str(error)) from error
    return tests if tests.count else None


def checks_of(tests: CodeTests, tolerance: float | None) -> list[str]:
    """`calls` and `asserts` as sources for `Executor.check`."""
    return [_call_source(test, tolerance) for test in tests.calls] + tests.asserts


def limits_for(tests: CodeTests, limits: Limits, question: Question) -> Limits:
    """`limits` with the question's own; the wall time is at least twice the processor time that a question asks for.

    Raises:
        DataError: the question names a limit that does not exist.
    """
    where = f"the limits of question {question.id}"
    whole = {key: int(value) if value == int(value) else value for key, value in tests.limits.items()}
    whole.setdefault("wall_seconds", max(limits.wall_seconds, 2 * whole.get("cpu_seconds", 0)))
    try:
        return validate(Limits, {**limits.model_dump(), **whole}, where=where)
    except ConfigError as error:
        raise DataError(str(error)) from error


_SAME = """
def _same_value(found, expected):
    if isinstance(found, tuple):
        found = list(found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same_value(found[key], expected[key]) for key in expected)
    if _tolerance is not None and {type(found), type(expected)} <= {int, float}:
        return found == expected or abs(found - expected) <= _tolerance * max(1, abs(expected))
    return found == expected
"""


def _call_source(test: CallTest, tolerance: float | None) -> str:
    arguments, expected = repr(json.dumps(test.arguments)), repr(json.dumps(test.expected))
    return (
        f"import json as _json\n_tolerance = {tolerance!r}\n{_SAME}\n"
        f"_found = ({test.function})(*_json.loads({arguments}))\n"
        f"assert _same_value(_found, _json.loads({expected})), 'another value was expected'\n"
    )
