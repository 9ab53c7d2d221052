"""Programs that want a score without solving the problem. What they would have to know is a random number.

Every test of a question asks for a secret, so a program gets more than nothing only by a leak or a lie. Scores are the
share of tests that pass: none may.
"""

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.reward.code import Code
from tests.reward.coding import answer, question, reward, score

SECRETS = [10**11 + secrets.randbelow(9 * 10**11) for _ in range(4)]
FUNCTION = question(
    calls=[{"function": "secret", "arguments": [0], "expected": SECRETS[0]}],
    asserts=[
        f"assert secret(1) == {SECRETS[1]}",
        f"def check(candidate):\n    assert candidate(2) == {SECRETS[2]} == candidate(2)\ncheck(secret)",
        f"assert all(map(lambda n: secret(n) == {SECRETS}[n], [2, 3]))",
        f"assert abs(secret(3) - {SECRETS[3]}) < 1e-6",
        f"assert [secret(3)] == [{SECRETS[3]}]",
        f"assert secret(3) in [{SECRETS[3]}]",
        f"assert not secret(3) != {SECRETS[3]}",
        f"import math\nassert math.isclose(secret(3), {SECRETS[3]})",
        f"assert math.isclose(secret(3), {SECRETS[3]})",
        f"assert str(secret(3)) == '{SECRETS[3]}'",
        f"assert {{secret(3): 1}} == {{{SECRETS[3]}: 1}}",
        f"match secret(3):\n    case {SECRETS[3]}: pass\n    case _: raise ValueError",
    ],
)
SCRIPT = question(
    stdin=[
        {"input": "0\n", "output": f"{SECRETS[0]}\n\n{SECRETS[1]}\n"},
        {"input": "1\n", "output": f"\n{SECRETS[2]}"},
        {"input": "2\n", "output": f"{SECRETS[3]}"},
    ]
)

EVERYWHERE = """
import gc, glob, inspect, os, re, sys

def texts():
    for path in ["/proc/self", "/proc/1", "/proc/2", *glob.glob("/proc/[0-9]*")]:
        for name in ["environ", "cmdline", "mem", "maps", "fd/0", "fd/1", "fd/2", "fd/3", "fd/4", "fd/5"]:
            try:
                fd = os.open(f"{path}/{name}", os.O_RDONLY | os.O_NONBLOCK)
                yield os.read(fd, 1 << 16).decode("latin1")
            except Exception:
                pass
    for folder in ["/tmp", "/work", "/home", "/root", "/python", os.getcwd()]:
        for top, _, names in os.walk(folder):
            for name in names[:50]:
                try:
                    yield open(os.path.join(top, name), "rb").read(1 << 16).decode("latin1")
                except Exception:
                    pass
            if top.count("/") > 4:
                break
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            yield " ".join(str(v) for v in thing.values() if type(v) in (int, str))
        elif isinstance(thing, (list, tuple)):
            yield " ".join(str(v) for v in thing if type(v) in (int, str))
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals)[:100000]
        yield repr(frame.f_code.co_consts)[:100000]
        frame = frame.f_back

def found():
    return [int(n) for text in texts() for n in re.findall(r"\\b\\d{10,12}\\b", text)]
"""
LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __hash__(self): return 0
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __sub__
    def __abs__(self): return 0
    def __bool__(self): return True
    def __contains__(self, item): return True
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __float__(self): return 0.0
    def __index__(self): return 0
    __int__ = __index__
"""
FORGE = """
import os, json
LINES = b"".join(json.dumps(line).encode() + b"\\n" for line in [
    {"status": "ok"}, {"status": "ok", "stderr": ""}, {"value": True}, {"value": {"handle": 0}},
    {"answer": {"value": 1}},
    {"status": "ok", "stdout": "1", "stderr": "", "seconds": 0.0, "fresh": True}, {"raised": ""}, {"ready": 1},
])
def forge():
    for fd in range(256):
        try:
            os.set_blocking(fd, False)
            os.write(fd, LINES)
        except OSError:
            pass
"""
WRONG = "def secret(n): return 0\n"

FUNCTIONS = {
    "equal to everything": LIAR + "def secret(n): return Liar()",
    "the function itself lies": LIAR + "secret = Liar()",
    "class with lying metaclass": LIAR
    + "class M(type):\n    __eq__ = Liar.__eq__\n    __hash__ = type.__hash__\nclass C(metaclass=M): pass\n"
    "def secret(n): return C",
    "int that equals everything": LIAR + "class I(Liar, int): pass\ndef secret(n): return I(7)",
    "float that equals everything": LIAR + "class F(Liar, float): pass\ndef secret(n): return F(7)",
    "str that equals everything": LIAR + "class S(Liar, str): pass\ndef secret(n): return S('7')",
    "list that equals everything": LIAR + "class L(Liar, list): pass\ndef secret(n): return L()",
    "dict that equals everything": LIAR + "class D(Liar, dict): pass\ndef secret(n): return D()",
    "object that claims to be an int": LIAR
    + "Liar.__class__ = property(lambda self: int)\ndef secret(n): return Liar()",
    "not a number": "def secret(n): return float('nan')",
    "infinity": "def secret(n): return float('inf')",
    "every integer": "import itertools\ndef secret(n): return itertools.count()",
    "endless generator": "def secret(n):\n    while True: yield n",
    "true": "def secret(n): return True",
    "AssertionError replaced": "import builtins\nclass AssertionError(Exception): pass\n"
    "builtins.AssertionError = Warning\n" + WRONG,
    "all, abs, map, str replaced": "import builtins\nbuiltins.all = builtins.abs = builtins.map = builtins.str = "
    "lambda *a: True\n" + WRONG,
    "json and math replaced": "import json, math\njson.loads = lambda text: 0\nmath.isclose = lambda *a: True\n"
    + WRONG,
    "a module of its own": "class math:\n    isclose = lambda *a, **k: True\n" + WRONG,
    "a module in its place": "import sys, types\nmath = sys.modules['math'] = types.SimpleNamespace(isclose=max)\n"
    + WRONG,
    "import replaced": "import builtins\nbuiltins.__import__ = lambda *a, **k: None\n" + WRONG,
    "check redefined": "def check(candidate): pass\ncandidate = None\n_same_value = lambda *a: True\n" + WRONG,
    "check's variables defined": "_found = 0\n_json = None\n_tolerance = 1e30\nglobals()['assert'] = 0\n" + WRONG,
    "exit at import": "import sys\n" + WRONG + "sys.exit(0)",
    "hard exit at import": "import os\n" + WRONG + "os._exit(0)",
    "exit in the function": "import sys\ndef secret(n): sys.exit(0)",
    "hard exit in the function": "import os\ndef secret(n): os._exit(0)",
    "kill everything": "import os\ndef secret(n):\n    for pid in (-1, 0, os.getppid(), 1):\n"
    "        try: os.kill(pid, 9)\n        except OSError: pass",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG,
    "StopIteration": "def secret(n): raise StopIteration(n)",
    "GeneratorExit": "def secret(n): raise GeneratorExit",
    "AssertionError": "def secret(n): raise AssertionError",
    "KeyboardInterrupt": "def secret(n): raise KeyboardInterrupt",
    "exception with a lying name": "class StopIteration(BaseException): pass\ndef secret(n): raise StopIteration",
    "exception whose text raises": "class E(Exception):\n    def __str__(self): raise self\ndef secret(n): raise E",
    "search everywhere at import": EVERYWHERE + "F = found()\ndef secret(n): return F[n % len(F)] if F else 0",
    "search everywhere in the function": EVERYWHERE + "def secret(n): return (found() or [0])[-1]",
    "read the next messages": "import os\ndef secret(n):\n    import re\n    for fd in range(64):\n        try:\n"
    "            os.set_blocking(fd, False)\n            text = os.read(fd, 1 << 16)\n"
    "            return int(re.findall(rb'\\d{10,}', text)[0])\n        except Exception: pass",
    "trace the harness": "import sys\nS = []\ndef spy(frame, event, arg):\n    S.append(arg)\n    S.extend("
    "v for v in frame.f_locals.values())\n    return spy\nsys.settrace(spy); sys.setprofile(spy)\n"
    "def secret(n): return max((s for s in S if type(s) is int), default=0)",
    "replace the harness": "import gc\n" + LIAR + "for f in gc.get_objects():\n"
    "    if type(f).__name__ == 'function' and f.__name__ in ('encode', 'answer', '_perform', 'send', 'to_json'):\n"
    "        try: f.__code__ = (lambda *a, **k: {'value': True, 'status': 'ok'}).__code__\n"
    "        except Exception: pass\n" + WRONG,
    "forge lines at import": FORGE + "forge()\n" + WRONG,
    "forge lines in the function": FORGE + "def secret(n):\n    forge()\n    return 0",
    "forge lines from a thread": FORGE + "import threading\ndef loop():\n    while True: forge()\n"
    "threading.Thread(target=loop, daemon=True).start()\n" + WRONG,
    "forge lines from a child": FORGE + "import os\nif os.fork() == 0:\n    while True: forge()\n" + WRONG,
    "forge an end of the iteration": "import os\ndef secret(n):\n    for fd in range(64):\n        try: os.write(fd, "
    'b\'{"error": ["StopIteration"], "message": ""}\\n\')\n        except OSError: pass\n    return 0',
    "answer nested too deep": "def secret(n):\n    v = []\n    for _ in range(5000): v = [v]\n    return v",
    "forged depth": "import os\ndef secret(n):\n    for fd in range(3, 64):\n        try: os.write(fd, "
    "b'{\"value\":' + b'[' * 3000 + b']' * 3000 + b'}\\n')\n        except OSError: pass\n    return 0",
    "giant answer": "def secret(n): return 'x' * 50_000_000",
    "giant number": "def secret(n): return 10 ** 30_000",
    "answer that contains itself": "def secret(n):\n    value = []\n    value.append(value)\n    return value",
    "repr and hash raise": LIAR
    + "def fail(self): raise ValueError\nLiar.__repr__ = Liar.__str__ = Liar.__hash__ = fail\n"
    "def secret(n): return Liar()",
    "text of the comparison": "class T:\n    def __str__(self): return str(self)\n    __repr__ = __str__\n"
    "def secret(n): return T()",
    "noise": "import sys\nprint('ok\\n' * 1_000_000); sys.stderr.write('ok' * 1_000_000)\n" + WRONG,
    "close all descriptors": "import os\nos.closerange(0, 256)\n" + WRONG,
    "native code": "import ctypes\ndef secret(n):\n    ctypes.string_at(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef secret(n): return secret(n)",
    "name that looks the same": "def s\u0435cret(n): return 0",
    "not Python": "def secret(n) return 0",
}
SCRIPTS = {
    "only the first line": f"print({SECRETS[0]})",
    "extra lines": f"print({SECRETS[0]}, '', {SECRETS[1]}, 'more', sep='\\n')\nprint({SECRETS[3]}, 'x', sep='\\n')",
    "nothing": "",
    "a blank line": "print()",
    "all guesses": f"print({', '.join(map(str, SECRETS))}, sep='\\n')",
    "exit at once": "import sys\nsys.exit(0)",
    "right, then failing": f"print({SECRETS[3]})\nraise SystemExit(1)",
    "right, then hanging": f"import time\nprint({SECRETS[3]}, flush=True)\ntime.sleep(60)",
    "on standard error": f"import sys\nprint({SECRETS[3]}, file=sys.stderr)",
    "overwritten on a terminal": f"print('0\\b{SECRETS[3]}')",
    "with a NUL": f"print('{SECRETS[3]}\\0')",
    "in another script's digits": f"print('{SECRETS[3]}'.translate({{48 + d: 0x660 + d for d in range(10)}}))",
    "search everywhere": EVERYWHERE + "print(*found(), sep='\\n')",
    "forge lines": FORGE + "forge()",
    "forge lines from a child": FORGE + "import os\nif os.fork() == 0:\n    while True: forge()\n",
    "endless output": "while True: print(0)",
}
HONEST = f"def secret(n):\n    return {SECRETS}[n]"
RESPONSES = {
    "code in the reasoning only": f"<think>```python\n{HONEST}\n```</think> <answer>see above</answer>",
    "the last block is wrong": answer(f"{HONEST}\n```\nor\n```python\n{WRONG}"),
    "another language": answer(HONEST, "javascript"),
    "an unclosed block": f"<think>a</think> <answer>```python\n{HONEST}</answer>",
    "no block": f"<think>a</think> <answer>{HONEST}</answer>",
    "two answers": answer(HONEST) + f"<answer>```python\n{HONEST}\n```</answer>",
    "an answer inside the reasoning": answer(HONEST).replace("</think>", "") + "</think>",
    "no answer": f"<think>a</think> ```python\n{HONEST}\n```",
    "reasoning that never ends": f"<think><answer>```python\n{HONEST}\n```</answer>",
}


@pytest.fixture(scope="module")
def code() -> Iterator[Code]:
    built = reward(mode="fraction", limits={"wall_seconds": 1.0, "cpu_seconds": 1.0}, max_seconds=2.0)
    yield built
    built.close()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_gets_nothing(code: Code, name: str) -> None:
    assert score(code, FUNCTION, answer(FUNCTIONS[name])) == 0.0


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_gets_nothing(code: Code, name: str) -> None:
    assert score(code, SCRIPT, answer(SCRIPTS[name])) == 0.0


@pytest.mark.parametrize("name", RESPONSES)
def test_response_gets_nothing(code: Code, name: str) -> None:
    assert score(code, FUNCTION, RESPONSES[name]) == 0.0


def test_honest_ones_pass() -> None:
    script = f"s = {SECRETS}\nprint(*[[s[0], '', s[1]], ['', s[2]], [s[3]]][int(input())], sep='\\n')"
    patient = reward(mode="fraction")
    assert score(patient, FUNCTION, answer(HONEST)) == 1.0
    assert score(patient, SCRIPT, answer(script)) == 1.0
    patient.close()


def test_attacks_are_programs() -> None:
    """One that does not compile would get nothing for no reason."""
    for name, source in (FUNCTIONS | SCRIPTS).items():
        if name != "not Python":
            compile(source, name, "exec")


def test_search_finds_what_is_there(tmp_path: Path) -> None:
    """Outside of a box it does: in a file, and in what /proc says of the environment."""
    (tmp_path / "tests.py").write_text(f"assert secret(0) == {SECRETS[0]}")
    source = EVERYWHERE.replace('"/tmp", "/work", "/home", "/root", "/python", ', "") + "print(*found())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source],
        cwd=tmp_path,
        env={"HIDDEN": str(SECRETS[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {str(SECRETS[0]), str(SECRETS[1])} <= set(done.stdout.split())
