import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.errors import DataError
from tests.data.tasks.written import build

ADD = {"input": "1\n2", "output": "3", "testtype": "functional"}
ECHO = {"input": "7\n", "output": "7\n", "testtype": "stdin"}


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def record(public: list[Any], private: str = "", **more: str) -> dict[str, str]:
    return {"question_content": "Do it.", "public_test_cases": json.dumps(public), "private_test_cases": private} | more


@pytest.mark.parametrize("pack", [json.dumps, lambda cases: packed(json.dumps(cases))])
def test_programs_with_public_and_private_tests(tmp_path: Path, pack: Any) -> None:
    hidden = {"input": "8\n", "output": "8\n", "testtype": "stdin"}
    problem = build("live_code_bench", tmp_path, [record([ECHO], pack([hidden]))]).row(0)
    assert problem.text == "Do it."
    assert problem.metadata["tests"]["stdin"] == [{"input": "7\n", "output": "7\n"}, {"input": "8\n", "output": "8\n"}]


def test_methods(tmp_path: Path) -> None:
    starter = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    row = record([ADD], metadata=json.dumps({"func_name": "add"}), starter_code=starter)
    problem = build("live_code_bench", tmp_path, [row]).row(0)
    assert problem.metadata["tests"]["calls"] == [{"function": "Solution().add", "arguments": [1, 2], "expected": 3}]
    assert "```python\nclass Solution:" in problem.text


def test_dates(tmp_path: Path) -> None:
    dates = ["2024-07-31T00:00:00", "2024-08-01T00:00:00", "2025-01-31T00:00:00", "2025-02-01T00:00:00"]
    rows = [record([ECHO], contest_date=date, question_content=date) for date in dates]
    task = build("live_code_bench", tmp_path, rows, after="2024-08-01", before="2025-02-01")
    assert [task.row(number).text for number in range(task.size)] == dates[1:3]
    with pytest.raises(DataError, match="no contest from 2026"):
        build("live_code_bench", tmp_path, rows, after="2026").row(0)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "done"),)

    with pytest.raises(DataError, match=r"line 1.*mkdir"):
        build("live_code_bench", tmp_path, [record([ECHO], packed(Attack()))]).row(0)
    assert not (tmp_path / "done").exists()


def test_nonsense(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="LiveCodeBench's form"):
        build("live_code_bench", tmp_path, [record([ECHO], "not base64!")]).row(0)
