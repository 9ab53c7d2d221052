import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_r1.config import component
from megatron_r1.errors import DataError
from tests.data.tasks.written import build

STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5\n", "output": "9\n"}]
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": ({"tests": {"stdin": STDIN}}, {"stdin": STDIN}),
    "ours as text, with limits": (
        {"tests": json.dumps({"stdin": STDIN, "language": "cpp", "limits": {"wall_seconds": 3}})},
        {"stdin": STDIN, "language": "cpp", "limits": {"wall_seconds": 3}},
    ),
    "a list of inputs and outputs": ({"official_tests": STDIN}, {"stdin": STDIN}),
    "APPS": (
        {"input_output": json.dumps({"inputs": ["1 2\n", "4 5\n"], "outputs": ["3\n", "9\n"]}), "starter_code": ""},
        {"stdin": STDIN},
    ),
    "APPS by lines": (
        {"input_output": json.dumps({"inputs": [["1", "2"]], "outputs": [["3"]]})},
        {"stdin": [{"input": "1\n2\n", "output": "3\n"}]},
    ),
    "APPS by calls": (
        {"input_output": json.dumps({"inputs": [[1, 2], [4, 5]], "outputs": [[3], [9]], "fn_name": "add"})},
        {
            "calls": [
                {"function": "add", "arguments": [1, 2], "expected": 3},
                {"function": "add", "arguments": [4, 5], "expected": 9},
            ]
        },
    ),
    "calls that return lists": (
        {"input_output": {"inputs": [[1], [2]], "outputs": [[1], [1, 2]], "fn_name": "upto"}},
        {
            "calls": [
                {"function": "upto", "arguments": [1], "expected": [1]},
                {"function": "upto", "arguments": [2], "expected": [1, 2]},
            ]
        },
    ),
    "open-r1": (
        {
            "verification_info": {
                "language": "python",
                "test_cases": [{**case, "fn_name": None, "type": "stdin_stdout"} for case in STDIN],
            },
            "time_limit": "2.5 seconds",
            "memory_limit": 256.0,
        },
        {"stdin": STDIN, "limits": {"cpu_seconds": 2.5, "memory_mib": 256}},
    ),
    "values as text, one a line": (
        {"tests": [{"input": '[1, 2]\n"a"', "output": "null", "fn_name": "f"}]},
        {"calls": [{"function": "f", "arguments": [[1, 2], "a"], "expected": None}]},
    ),
    "MBPP": (
        {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "prelude": "import math"},
        {"asserts": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "prelude": "import math"},
    ),
    "MBPP, sanitized and full": (
        {"test_list": ["assert f() < EPS"], "test_imports": ["import math", "import re"], "test_setup_code": "EPS = 1"},
        {"asserts": ["assert f() < EPS"], "prelude": "import math\nimport re\nEPS = 1"},
    ),
    "lists in columns": (
        {"tests": {"input": ["1 2\n", "4 5\n"], "output": ["3\n", "9\n"]}},
        {"stdin": STDIN},
    ),
    "subtasks": (
        {"tests": {"stdin": STDIN, "subtasks": [{"points": 30, "tests": [0]}, {"points": 70, "tests": [0, 1]}]}},
        {"stdin": STDIN, "subtasks": [{"points": 30, "tests": [0]}, {"points": 70, "tests": [0, 1]}]},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_tests(shape: str, tmp_path: Path) -> None:
    columns, tests = SHAPES[shape]
    problem = build("code", tmp_path, [{"problem": "Add.", **columns}]).row(0)
    assert problem.metadata["tests"] == {"language": "python", **tests}
    assert json.loads(json.dumps(problem.metadata)) == problem.metadata


def test_empty_columns_of_an_arrow_table_are_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"problem": "Add.", "tests": {"stdin": STDIN, "asserts": None}},
        {"problem": "Add.", "tests": {"stdin": None, "asserts": ["assert add(1, 2) == 3"]}},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "code.parquet")
    task = component.build("task", {"type": "code", "source": str(tmp_path / "code.parquet")})
    assert task.row(0).metadata["tests"] == {"language": "python", "stdin": STDIN}
    assert task.row(1).metadata["tests"] == {"language": "python", "asserts": ["assert add(1, 2) == 3"]}


def test_methods_are_called_on_a_solution_whose_imports_are_there(tmp_path: Path) -> None:
    starter = "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n"
    tests = {"inputs": [[[2, 7], 9]], "outputs": [[[0, 1]]], "fn_name": "twoSum"}
    problem = build("code", tmp_path, [{"problem": "Find.", "input_output": tests, "starter_code": starter}]).row(0)
    [call] = problem.metadata["tests"]["calls"]
    assert call == {"function": "Solution().twoSum", "arguments": [[2, 7], 9], "expected": [0, 1]}
    space: dict[str, Any] = {}
    exec(problem.metadata["tests"]["prelude"] + starter + "        return [0, 1]", space)
    assert space["Solution"]().twoSum([2, 7], 9) == [0, 1]
    assert problem.text == f"Find.\n\nComplete this code:\n\n```python\n{starter.rstrip()}\n```"


def test_the_prompt_says_what_a_solution_is_called_by(tmp_path: Path) -> None:
    asserts = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    rows = [
        {"problem": "Add.", "tests": asserts},
        {"problem": "Add.", "tests": [{"input": [1], "output": 1, "fn_name": "add"}]},
        {"problem": "Add.", "tests": STDIN},
    ]
    texts = [build("code", tmp_path, rows).row(number).text for number in range(3)]
    assert texts == [f"Add.\n\n{asserts[0]}", "Add.\n\nTests call `add`.", "Add."]
    assert build("code", tmp_path, rows, shown_asserts=0).row(0).text == "Add."
    assert build("code", tmp_path, rows, language="cpp").row(2).metadata["tests"]["language"] == "cpp"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no tests in any of tests, .*the columns are problem"),
        ({"tests": []}, "no tests in any"),
        ({"tests": {"stdin": []}}, "there is no test: at least one of"),
        ({"tests": "{"}, "tests that cannot be read"),
        ({"tests": 7}, "cannot be read .it is 7.; known shapes"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "its keys are"),
        ({"tests": {"inputs": [[1]], "outputs": [1]}}, "are texts, not 1"),
        ({"tests": [{"input": "1"}]}, "cannot be read .'output'"),
        ({"tests": {"stdin": [{"input": "1", "outptu": "2"}]}}, r"stdin\.0\.output Field required"),
        ({"tests": {"stdin": STDIN, "subtasks": [{"points": 1, "tests": [2]}]}}, "there are tests 0 to 1"),
        ({"tests": {"stdin": STDIN, "language": "rust"}}, "language Input should be 'python' or 'cpp'"),
        ({"tests": {"asserts": ["assert f()"], "language": "cpp"}}, "cpp programs are tested by stdin"),
    ],
)
def test_bad_rows_are_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"code\.jsonl, line 1: .*{message}"):
        build("code", tmp_path, [{"problem": "Add.", **columns}]).row(0)
