"""The code reward through its real sandbox."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.code_tests import CodeTests
from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError, DataError, EngineError
from megatron_r1.reward.code import Code, combine
from megatron_r1.reward.code_tests import limits_for, read_tests
from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Sample
from tests.reward.coding import answer, question, reward, score

ADD = "def add(a, b):\n    return a + b"
SUM = "a, b = map(int, input().split())\nprint(a + b)"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}, {"input": "-1 1\n", "output": "0"}]
CPP = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"


@pytest.fixture(scope="module")
def code() -> Iterator[Code]:
    built = reward(mode="fraction", no_code=-1.0, compile_error=-0.5, float_tolerance=1e-6)
    yield built
    built.close()


TESTS: dict[str, dict[str, Any]] = {
    "stdin": {"stdin": PAIRS},
    "calls": {"calls": [{"function": "add", "arguments": [1, 2], "expected": 3}]},
    "method": {"calls": [{"function": "Solution().add", "arguments": ["a", "b"], "expected": "ab"}]},
    "asserts": {"asserts": ["assert add(1, 2) == 3", "assert add([1], [2]) == [1, 2]"]},
    "prelude": {"asserts": ["assert add(math.floor(1.5), 2) == 3"], "prelude": "import math"},
    "all kinds": {
        "stdin": PAIRS[:1],
        "calls": [{"function": "add", "arguments": [0.1, 0.2], "expected": 0.3}],
        "asserts": ["assert add(1, 1) == 2"],
    },
    "EXPECTED in the arguments": {
        "calls": [{"function": "add", "arguments": ["{expected}", "'"], "expected": "{expected}'"}]
    },
    "tuple for a list": {"calls": [{"function": "add", "arguments": [1, 2], "expected": 3}]},
}
RIGHT = (
    f"{ADD}\nclass Solution:\n    def add(self, a, b): return a + b\nif __name__ == '__main__':\n    "
    + SUM.replace("\n", "\n    ")
)


@pytest.mark.parametrize("name", TESTS)
def test_right_and_wrong(code: Code, name: str) -> None:
    asked = question(**TESTS[name])
    assert score(code, asked, answer(RIGHT)) == 1.0
    assert score(code, asked, answer(RIGHT.replace("a + b", "a"))) == 0.0


def test_share_of_tests(code: Code) -> None:
    assert score(code, question(stdin=PAIRS), answer("print(3)")) == pytest.approx(1 / 3)
    calls = [{"function": "f", "arguments": [n], "expected": [[n], {"a": n}]} for n in range(4)]
    assert score(code, question(calls=calls), answer("def f(n): return (n % 3,), {'a': n % 3}")) == 0.75


def test_prelude_goes_before_a_script(code: Code) -> None:
    asked = question(stdin=[{"input": "", "output": "2"}], prelude="import math")
    assert score(code, asked, answer("print(math.floor(2.5))")) == 1.0


def test_special_scores(code: Code) -> None:
    asked = question(stdin=PAIRS, asserts=["assert True"])
    assert score(code, asked, "<think>a</think> <answer>no code</answer>") == -1.0
    assert score(code, asked, "no answer at all") == -1.0
    assert score(code, question(asserts=["assert True"]), answer("def f(:")) == 0.0
    assert score(code, question(stdin=PAIRS), answer("def f(:")) == 0.0
    assert score(code, question(), answer(ADD)) is None
    assert score(code, question(stdin=[], calls=[]), answer(ADD)) is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_cpp(code: Code) -> None:
    asked = question(stdin=PAIRS, language="cpp")
    assert score(code, asked, answer(CPP, "cpp")) == 1.0
    assert score(code, asked, answer(CPP.replace("a + b", "a - b"), "c++")) == 0.0
    assert score(code, asked, answer(CPP.replace("long", "lang"), "cpp")) == -0.5
    assert score(code, asked, answer(SUM)) == -1.0


def test_question_limits(code: Code) -> None:
    slow = "import time\ntime.sleep(1.5)\n" + SUM
    assert score(code, question(stdin=PAIRS[:1], limits={"wall_seconds": 0.5}), answer(slow)) == 0.0
    assert score(code, question(stdin=PAIRS[:1], limits={"wall_seconds": 20, "memory_mib": 256.0}), answer(slow)) == 1.0


def test_wall_time_follows_processor_time() -> None:
    asked = question(asserts=["f()"], limits={"cpu_seconds": 20})
    tests = read_tests(asked)
    assert tests is not None
    assert limits_for(tests, Limits(), asked) == Limits(cpu_seconds=20.0, wall_seconds=40.0)


@pytest.mark.parametrize(
    "tests",
    [
        {"stdin": [{"input": "1"}]},
        {"stdins": []},
        {"calls": [{"function": "f(", "arguments": [], "expected": 1}]},
        {"language": "cpp", "asserts": ["assert f()"]},
        {"asserts": ["f()"], "limits": {"cpu": 3}},
        {"asserts": ["f()"], "limits": {"processes": 2.5}},
        {"asserts": ["f()"], "subtasks": [{"points": 1, "tests": [1]}]},
    ],
)
def test_tests_that_cannot_be_used(code: Code, tests: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="question q"):
        score(code, question(**tests), answer(ADD))


def test_open_r1_compares_the_first_lines_only() -> None:
    asked = question(stdin=[{"input": "", "output": "1\n2"}, {"input": "", "output": "1"}])
    original, ours = reward(mode="fraction", compatible="open-r1"), reward(mode="fraction")
    assert score(original, asked, answer("print(1)")) == 1.0
    assert score(ours, asked, answer("print(1)")) == 0.5
    once = "import time\nif input() == 'slow': time.sleep(9)\nprint(1)"
    asked = question(
        stdin=[{"input": "fast\n", "output": "1"}, {"input": "slow\n", "output": "1"}], limits={"wall_seconds": 2.0}
    )
    assert score(original, asked, answer(once)) == 0.0
    assert score(ours, asked, answer(once)) == 0.5
    original.close()
    ours.close()


def test_first_failure_and_budget_end_it() -> None:
    hang = "def f(n):\n    while n: pass"
    calls = [{"function": "f", "arguments": [n], "expected": None} for n in range(12)]
    strict, patient = (
        reward(limits={"wall_seconds": 1.0}),
        reward(mode="fraction", limits={"wall_seconds": 1.0}, max_seconds=1.5),
    )
    assert score(strict, question(calls=calls), answer(hang)) == 0.0
    assert score(patient, question(calls=calls), answer(hang)) == pytest.approx(1 / 12)
    assert patient.deadline > 1.5 + 1.0
    strict.close()
    patient.close()


def test_combine() -> None:
    tests = CodeTests(
        asserts=["0", "1", "2"],
        subtasks=[
            {"points": 30, "tests": [0, 1]},  # type: ignore[list-item]
            {"points": 70, "tests": [1, 2]},  # type: ignore[list-item]
        ],
    )
    some, every, none = [True, True, False], [True] * 3, [False] * 3
    assert [combine("pass", passed, tests) for passed in (some, every, none)] == [0.0, 1.0, 0.0]
    assert [combine("fraction", passed, tests) for passed in (some, every, none)] == [2 / 3, 1.0, 0.0]
    assert [combine("weighted", passed, tests) for passed in (some, every, none)] == [0.1 * 2 / 3, 1.1, 0.0]
    assert [combine("subtasks", passed, tests) for passed in (some, every, none)] == [0.3, 1.0, 0.0]


@pytest.mark.parametrize(
    "keys", [{"sandbox": "remote"}, {"sandbox": "piston"}, {"url": "http://localhost"}, {"sandbox": "docker"}]
)
def test_sandbox_that_cannot_be(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        reward(**keys)


def test_remote_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_R1_SANDBOX_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="MEGATRON_R1_SANDBOX_TOKEN"):
        score(reward(sandbox="remote", url="http://127.0.0.1:1"), question(stdin=PAIRS), answer(SUM))


def test_in_the_judge() -> None:
    section = {"type": "code", "limits": {"wall_seconds": 20.0}}
    samples = [Sample([], [], text, True, 0) for text in (answer(SUM), answer("print(3)"), "nothing")]
    with Judge({"code": section}, workers=1, timeout=100.0) as judge:
        judge([Group(question(stdin=PAIRS), [], samples)])
    assert [sample.reward for sample in samples] == [1.0, 0.0, 0.0]
    assert [sample.correct for sample in samples] == [True, False, False]


def test_a_sandbox_that_does_not_work_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with (
        Judge({"code": {"type": "code"}}, workers=1, timeout=100.0) as judge,
        pytest.raises(EngineError, match="rlimits"),
    ):
        judge([Group(question(stdin=PAIRS), [], [Sample([], [], answer(SUM), True, 0)])])
