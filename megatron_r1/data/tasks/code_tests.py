"""Tests of programs: the shapes that data sets have, turned into the one that the rewards read."""

import json
import re
from typing import Any

from pydantic import ValidationError

from megatron_r1.config.code_tests import CodeTests
from megatron_r1.data.records import Row
from megatron_r1.errors import DataError

_SHAPES = (
    "{stdin | calls | asserts: ...}, {inputs, outputs, fn_name}, {test_cases: ...}, [{input, output}, ...], "
    "['assert ...', ...]"
)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_METHOD_PRELUDE = (
    "from bisect import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\n"
    "from itertools import *\nfrom typing import *\nimport math, random, re, string\n"
)
"""What the site that methods of a class `Solution` come from has imported; their starter code uses it."""


def code_tests(row: Row, value: Any, language: str | None) -> dict[str, Any]:
    """The tests of a row in the form of `CodeTests`, without what is empty.

    Args:
        row: for `starter_code`, what `_prelude` reads, `time_limit` (seconds), `memory_limit` (MB), and its place.
        value: one of: that form itself; APPS and TACO (`inputs`, `outputs`, `fn_name`); `test_cases` of open-r1's
            `verification_info`; a list of `{input, output}`; MBPP's list of asserts. JSON text of any of them.
        language: of the programs, unless the tests name it.

    Raises:
        DataError: another shape, or values that do not fit it.
    """
    try:
        method = "class Solution" in str(row.get("starter_code"))
        shaped = _shaped(_plain(value), method)
        shaped.setdefault("language", language or "python")
        shaped.setdefault("prelude", _prelude(row) or (_METHOD_PRELUDE if method else ""))
        shaped["limits"] = {**_limits(row), **(shaped.get("limits") or {})}
        tests = CodeTests.model_validate_json(json.dumps(shaped), strict=True)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, part['loc']))} {part['msg']}".strip() for part in error.errors()]
        raise DataError(f"{row.place}: tests: {'; '.join(reasons[:3])}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{row.place}: tests that cannot be read ({error}); known shapes: {_SHAPES}") from error
    if not tests.count:
        raise DataError(f"{row.place}: there is no test: at least one of stdin, calls, asserts is needed")
    return tests.model_dump(exclude_defaults=True) | {"language": tests.language}


def _prelude(row: Row) -> str:
    """Source that the tests need: `prelude`, or MBPP's `test_imports` (a list) and `test_setup_code`."""
    imports = row.get("test_imports")
    parts = [row.get("prelude"), *(imports if isinstance(imports, list) else [imports]), row.get("test_setup_code")]
    return "\n".join(str(part) for part in parts if part)


def _plain(value: Any) -> Any:
    """JSON text parsed; tables without the empty entries that Arrow fills in."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if part is not None}
    return value


def _shaped(value: Any, method: bool) -> dict[str, Any]:
    """Keys of `CodeTests`; `method` = functions are methods of a class `Solution`."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return {"asserts": value}
    if isinstance(value, list):
        return _cases(value, method)
    if not isinstance(value, dict):
        raise ValueError(f"it is {value!r}")
    if value.keys() & {"stdin", "calls", "asserts"}:
        return value
    if "test_cases" in value:
        language = {"language": value["language"]} if value.get("language") else {}
        return _cases(_plain(value["test_cases"]), method) | language
    inputs, outputs = (value.get(f"{key}s", value.get(key)) for key in ("input", "output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError(f"its keys are {sorted(value)}")
    name = value.get("fn_name")
    return _cases([{"input": i, "output": o, "fn_name": name} for i, o in zip(inputs, outputs, strict=True)], method)


def _cases(cases: list[dict[str, Any]], method: bool) -> dict[str, Any]:
    """Cases with `input`, `output`, and `fn_name` where a function is called."""
    calls = [case for case in cases if case.get("fn_name")]
    stdin = [{key: _lines(case[key]) for key in ("input", "output")} for case in cases if not case.get("fn_name")]
    # Where every expected value is a list of one, the list is APPS's wrapping.
    wrapped = all(isinstance(case["output"], list) and len(case["output"]) == 1 for case in calls)
    return {
        "stdin": stdin,
        "calls": [
            {
                "function": f"Solution().{case['fn_name']}" if method else case["fn_name"],
                "arguments": _values(case["input"]),
                "expected": case["output"][0] if wrapped else _value(case["output"]),
            }
            for case in calls
        ],
    }


def _lines(text: Any) -> str:
    """Standard input or output; some data sets hold it as a list of lines."""
    if isinstance(text, list):
        return "\n".join(map(str, text)) + "\n"
    if not isinstance(text, str):
        raise ValueError(f"input and output of a program are texts, not {text!r}")
    return text


def _values(arguments: Any) -> list[Any]:
    """Arguments of a call: a list, or text with one JSON value a line (LiveCodeBench)."""
    return [json.loads(line) for line in arguments.splitlines()] if isinstance(arguments, str) else list(arguments)


def _value(expected: Any) -> Any:
    return json.loads(expected) if isinstance(expected, str) else expected


def _limits(row: Row) -> dict[str, int | float]:
    """Limits that the row states, as the sandbox calls them."""
    seconds, megabytes = _number(row.get("time_limit")), _number(row.get("memory_limit"))
    limits: dict[str, int | float] = {"cpu_seconds": seconds} if seconds > 0 else {}
    return limits | ({"memory_mib": round(megabytes)} if megabytes >= 1 else {})


def _number(value: Any) -> float:
    """A number, or what a text such as "2.0 seconds" begins with; 0 where there is none."""
    found = _NUMBER.match(str(value))
    return float(found[0]) if found else 0.0
