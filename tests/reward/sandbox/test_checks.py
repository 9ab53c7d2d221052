"""Checks in two boxes: what crosses between them, and what a check may say about a program."""

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import ConfigError
from megatron_r1.reward.sandbox.inside.caller import Proxy, free_names
from megatron_r1.reward.sandbox.inside.channel import to_json
from megatron_r1.reward.sandbox.inside.values import NotPlainError, decode, encode
from megatron_r1.reward.sandbox.job import Program, Run
from megatron_r1.reward.sandbox.local import Local, open_pool

LIMITS = Limits(wall_seconds=20.0)
PROGRAM = """
import dataclasses, enum, collections, itertools
LIMIT = 7
def add(a, b=0): return a + b
def same(value): return value
def fail(n): raise {0: ValueError, 1: KeyError, 2: Custom, 3: OSError}[n]("message")
def select(n): return n
class queue:
    def turn(n): return n
class Custom(ValueError): pass
class Fault(Exception): pass
def fault(): raise Fault("own")
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, place): return self.items[place]
    def __setitem__(self, place, item): self.items[place] = item
    def __iter__(self): return iter(self.items)
    def __str__(self): return f"Stack{self.items}"
    def merge(self, other): return Stack(self.items + other.items)
@dataclasses.dataclass
class Point:
    x: int
    y: "int" = 0
class Color(enum.IntEnum):
    RED = 1
Pair = collections.namedtuple("Pair", "a b")
def squares():
    for n in itertools.count(): yield n * n
counter = 0
def count():
    global counter
    counter += 1
    return counter
def kinds(): return [type(v).__name__ for v in seen]
seen = []
def see(*values, **more): seen.extend([*values, *more.values()])
def clear(items): items.clear()
def talk():
    import sys
    print("x" * 200_000)
    sys.stderr.write("x" * 200_000)
"""
HOLD = {
    "call": "assert add(1, 2) == 3",
    "keywords": "assert add(1, b=4) == 5",
    "global value": "assert LIMIT == 7",
    "plain types arrive as they are": (
        "v = [None, True, 1, -2**80, 10**5000, 1.5, 1j, 's', '\\ud800', b'b', (1, (2,)), {1, 2}, "
        "frozenset([3]), {1: {'a': [()]}, None: 2, (1,): 3}]\nw = same(v)\nassert v == w\n"
        "assert [type(a) for a in v] == [type(b) for b in w]"
    ),
    "floats": (
        "import math\nassert math.isnan(same(math.nan)) and same(math.inf) == math.inf and str(same(-0.0)) == '-0.0'"
    ),
    "types in the program": "see(1, 1.5, (1,), {1}, frozenset(), b'', x={})\n"
    "assert kinds() == ['int', 'float', 'tuple', 'set', 'frozenset', 'bytes', 'dict']",
    "subclasses become their base": "assert add(Color.RED, 1) == 2\nassert Pair(1, 2) == (1, 2)",
    "object": "s = Stack()\ns.push(3).push([4])\nassert len(s) == 2 and s[0] == 3 and s.pop() == [4]\ns[0] = 9\n"
    "assert s.items == [9] and list(s) == [9] and str(s) == 'Stack[9]'\ns.items = [1, 2]\nassert len(s) == 2",
    "objects as arguments": "assert list(Stack([1]).merge(Stack([2]))) == [1, 2]",
    "attribute of a dataclass": "p = Point(3)\nassert (p.x, p.y) == (3, 0) and p is not None and p != None",
    "missing attribute": "assert not hasattr(Stack(), 'nothing') and getattr(Stack(), 'nothing', 5) == 5",
    "generator": "import itertools\nassert list(itertools.islice(squares(), 4)) == [0, 1, 4, 9]\n"
    "g = squares()\nassert [next(g), next(g), next(g)] == [0, 1, 4]",
    "built-in exception": (
        "try:\n    fail(0)\n    raise SystemError\nexcept ValueError as error:\n    assert str(error) == 'message'"
    ),
    "its subclass": "try:\n    fail(1)\n    raise SystemError\nexcept LookupError:\n    pass",
    "own subclass of a built-in": "try:\n    fail(2)\n    raise SystemError\nexcept ValueError:\n    pass",
    "own exception": (
        "try:\n    fault()\n    raise SystemError\n"
        "except Exception as error:\n    assert type(error) is Exception and str(error) == 'own'"
    ),
    "undefined name": "try:\n    nothing\n    raise SystemError\nexcept NameError:\n    pass",
    "arguments are copies": "v = [1]\nclear(v)\nassert v == [1]",
    "functions of the check": "def twice(f, n):\n    return f(f(n))\nassert twice(lambda n: add(n, 1), 1) == 3",
    "names in a comprehension": "assert [add(n, 1) for n in range(3)] == [1, 2, 3]",
    "talks while it answers": "for n in range(3): talk()",
    "module that nobody imported": "assert math.isclose(same(0.1 + 0.2), 0.3) and string.digits[:1] == '0'",
    "names of modules": "assert select(1) == 1 == queue.turn(1)",
    "given function": "assert given(4) == 40",
    "given to the program": "assert uses_given(4) == 40",
}
FAIL = {
    "wrong value": "assert add(1, 2) == 4",
    "raises": "fail(0)",
    "leaves": "import sys\nsys.exit(0)",
    "undefined": "nothing(1)",
    "syntax": "assert assert",
    "compared objects": "assert Point(1) == Point(1)",
    "different objects": "assert Point(1) != Point(2)",
    "calls back": "add(lambda: 1)",
    "dies": "import os\nos._exit(3)",
    "object in a list": "assert [Point(1)] == [1]",
}


@pytest.fixture(scope="module")
def executor() -> Iterator[Local]:
    local = Local(open_pool("bubblewrap", 2))
    yield local
    local.close()


def check(executor: Local, source: str, *checks: str, **limits: Any) -> list[Run]:
    prelude = "def given(n): return n * 10"
    program = Program("python", source + "\ndef uses_given(n): return given(n)")
    return list(executor.check(program, prelude, checks, LIMITS.model_copy(update=limits)))


def test_what_holds(executor: Local) -> None:
    runs = check(executor, PROGRAM, *HOLD.values())
    assert {name: run.stderr for name, run in zip(HOLD, runs, strict=True) if run.status != "ok"} == {}


def test_what_holds_without_namespaces() -> None:
    local = Local(open_pool("rlimits", 2))
    runs = check(local, PROGRAM, *HOLD.values(), FAIL["wrong value"])
    local.close()
    assert [run.status for run in runs] == ["ok"] * len(HOLD) + ["failed"]


def test_what_fails(executor: Local) -> None:
    runs = check(executor, PROGRAM, *FAIL.values(), "assert add(1, 1) == 2")
    assert [name for name, run in zip([*FAIL, "last"], runs, strict=True) if run.status == "ok"] == ["last"]
    assert runs[0].stderr == "check.py, line 1: AssertionError"


def test_the_program_cannot_shadow_what_the_check_has(executor: Local) -> None:
    source = "def given(n): return 0\nabs = len = isinstance = lambda *a: 0\ndef value(): return -3"
    (run,) = check(executor, source, "assert given(4) == 40 and abs(value()) == 3 and len([1]) == 1")
    assert run.status == "ok", run.stderr


def test_one_process_for_all_checks_until_it_dies(executor: Local) -> None:
    source = PROGRAM + "\nimport os\ndef die(): os._exit(0)\ndef hang():\n    while True: pass"
    first = "assert count() == 1"
    checks = [first, "assert count() == 2", "die()", first, "hang()", first]
    runs = check(executor, source, *checks, wall_seconds=3.0)
    assert [run.status for run in runs] == ["ok", "ok", "failed", "ok", "timeout", "ok"]


def test_a_program_that_cannot_start(executor: Local) -> None:
    for source, status in {
        "def f(:": "failed",
        "raise ValueError('at import')": "failed",
        "import sys; sys.exit(0)": "failed",
        "import os; os._exit(0)": "failed",
        "x = 'x' * (1 << 30)": "failed",
        "while True: pass": "timeout",
    }.items():
        runs = check(executor, source, "assert True", "assert True", wall_seconds=3.0, cpu_seconds=30.0)
        assert [run.status for run in runs] == [status, status], source


def test_stops_with_who_asked(executor: Local) -> None:
    start = time.monotonic()
    checks = ["assert True", *["import time; time.sleep(15)"] * 2]
    runs = executor.check(Program("python", ""), "", checks, LIMITS)
    assert next(iter(runs)).status == "ok"
    del runs
    assert check(executor, "", "assert True")[0].status == "ok"
    assert time.monotonic() - start < 15


def test_several_threads(executor: Local) -> None:
    def work(number: int) -> list[str]:
        source = f"def own(): return {number}"
        return [run.status for run in check(executor, source, *[f"assert own() == {number}", "assert own() < 0"] * 5)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(12))) == [["ok", "failed"] * 5] * 12


def test_cpp_has_no_checks(executor: Local) -> None:
    with pytest.raises(ConfigError, match="cpp"):
        list(executor.check(Program("cpp", "int main() {}"), "", ["assert True"], LIMITS))


def test_free_names() -> None:
    source = (
        "import math\nfrom os import path as p\nx = f(1)\ndef check(c, *, d=default):\n    global late\n    late = 1\n"
        "    str = g(c)\n    return [h(i, str, x) for i in c] + [p, math, late]\nclass C(Base):\n    y = y2\n"
        "assert check(lambda z: z + w) and x and f'{inner}'\nfor n in ns: n\n"
    )
    assert free_names(source) == {"f", "default", "g", "h", "Base", "y2", "w", "inner", "ns"}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.frozensets(st.integers() | st.text(), max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
    max_leaves=20,
)


def no_handle(thing: Any) -> Any:
    raise AssertionError(thing)


@given(plain)
def test_plain_values_survive(value: Any) -> None:
    found = decode(json.loads(to_json(encode(value, no_handle))), no_handle)
    assert found == value
    assert repr(type(found)) == repr(type(value))
    if isinstance(value, float):
        assert math.copysign(1, found) == math.copysign(1, value)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["int", "float", "complex", "bytes", "tuple", "set", "frozenset", "dict", "handle", "x"]),
            inner,
            max_size=2,
        )
    ),
    max_leaves=20,
)


@given(trees)
def test_any_tree_is_a_plain_value_or_an_error(tree: Any) -> None:
    exact = {type(None), bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, Proxy}
    try:
        value = decode(tree, lambda number: Proxy(None, number))  # type: ignore[arg-type]
    except NotPlainError:
        return
    waiting = [value]
    while waiting:
        part = waiting.pop()
        assert type(part) in exact
        if type(part) in {list, tuple, set, frozenset, dict}:
            waiting += part
            waiting += part.values() if type(part) is dict else []


def test_depth_is_bounded() -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(NotPlainError):
        encode(deep, no_handle)
    with pytest.raises(NotPlainError):
        decode(deep, no_handle)
