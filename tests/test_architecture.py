"""The layers and budgets of docs/architecture.md, proved on the sources; each rule is also shown to catch a breach."""

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_r1"
TESTS = ROOT / "tests"

LAYERS = (
    {"cli", "launch", "options"},
    {"recipe", "cluster"},
    {"train", "evaluate", "curate", "convert", "plan", "doctor"},
    {"optim", "weight_sync", "checkpoint"},
    {"model", "rollout"},
    {"data", "reward", "advantage", "loss", "report"},
    {"config"},
    {"types", "registry", "compat", "errors", "seeds", "wording"},
)
MODULE_LAYERS = {1, len(LAYERS)}  # single modules, which may build on each other; packages of a layer may not
LEVEL = {part: level for level, parts in enumerate(LAYERS, 1) for part in parts}

ONLY_IN = {
    "vllm": {"rollout"},
    "megatron": {
        "model",
        "optim",
        "weight_sync",
        "checkpoint",
        "data",
        "plan",
        "compat",
        "train/policy.py",
        "train/passes.py",
    },
    "wandb": {"report"},
}
WITHOUT_TORCH = ("reward", "advantage")
HEAVY = {"torch", "vllm", "megatron", "transformers", "numpy", "pydantic", "rich", "plotly", "wandb", "tensorboard"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
FORBIDDEN_NAMES = {"utils", "util", "misc", "helpers", "helper", "common"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: its path below the package, and its syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(), filename=str(path))


def part_of(path: str) -> str:
    """The package or top-level module that a file belongs to: `data/tasks/base.py` -> `data`."""
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward_imports(path: str, tree: ast.Module) -> list[str]:
    """Imports that do not point to a lower layer (or stay inside their own package)."""
    own = part_of(path)
    found = []
    for line, name in imported(tree):
        root, _, rest = name.partition(".")
        target = rest.split(".", maxsplit=1)[0]
        if root != "megatron_r1" or target in {own, "", "__version__"}:
            continue
        if target not in LEVEL:
            found.append(f"{path}:{line} imports {name}, which no layer holds")
        elif LEVEL[target] < LEVEL[own] or (LEVEL[target] == LEVEL[own] and LEVEL[own] not in MODULE_LAYERS):
            found.append(f"{path}:{line} ({own}, layer {LEVEL[own]}) imports {target} (layer {LEVEL[target]})")
    return found


def misplaced_upstream(path: str, tree: ast.Module) -> list[str]:
    """Imports of vllm, megatron or wandb outside the packages that own them."""
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported(tree)
        if not {part_of(path), path} & ONLY_IN.get(name.split(".", maxsplit=1)[0], {part_of(path)})
    ]


def over_budget(path: str, text: str) -> list[str]:
    """Files, functions and parameter lists that are too long."""
    lines = len(text.splitlines())
    found = [f"{path}: {lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{path}:{node.lineno} {node.name}: {length} lines")
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in {"self", "cls"}])
        if count > MAX_PARAMETERS:
            found.append(f"{path}:{node.lineno} {node.name}: {count} parameters")
    return found


def guarded_imports(path: str, tree: ast.Module) -> list[str]:
    """`try: import x` outside compat."""
    if part_of(path) == "compat":
        return []
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Try | ast.TryStar)
        and any(
            isinstance(inner, ast.Import | ast.ImportFrom) for statement in node.body for inner in ast.walk(statement)
        )
    ]


def single_transfers(path: str, tree: ast.Module) -> list[str]:
    """Sends and receives that are in no batch: for each pair of ranks NCCL keeps a communicator of its own for them."""
    names = {"send", "recv", "isend", "irecv", "send_object_list", "recv_object_list"}
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
        if isinstance(node.func.value, ast.Name) and node.func.value.id in {"dist", "distributed"}
    ]


def names_nothing(path: str) -> bool:
    """Whether a file or folder on the path has a name that says nothing."""
    return bool(FORBIDDEN_NAMES & {part.removesuffix(".py") for part in path.split("/")})


def packages() -> list[str]:
    """The packages directly below megatron_r1."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def has_tests(package: str, tests: Path) -> bool:
    """Whether tests/<package>/ or tests/test_<package>.py holds a test file."""
    return (tests / f"test_{package}.py").exists() or any((tests / package).rglob("test_*.py"))


def unnamed(parts: list[str], text: str) -> list[str]:
    """The parts that a text does not name, as a whole word in code font or followed by a slash."""
    return [part for part in parts if not re.search(rf"`(megatron_r1/)?{part}\b|\b{part}/", text)]


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_imports_point_downwards() -> None:
    assert [breach for path, tree in sources() for breach in upward_imports(path, tree) if path != "__init__.py"] == []


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path, _ in sources()} - {"__init__"} <= set(LEVEL)


def test_upstream_packages_stay_in_their_place() -> None:
    assert [breach for path, tree in sources() for breach in misplaced_upstream(path, tree)] == []


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_no_torch_in(package: str) -> None:
    modules = [
        "megatron_r1." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path, _ in sources()
        if part_of(path) == package
    ]
    assert "torch" not in loaded_by(f"import {', '.join(modules)}")
    inside_functions = [name for path, tree in sources() if part_of(path) == package for _, name in imported(tree)]
    assert not [name for name in inside_functions if name.split(".", maxsplit=1)[0] == "torch"]


def test_budgets() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *TESTS.rglob("*.py")]
    assert [
        found for path in sorted(files) for found in over_budget(str(path.relative_to(ROOT)), path.read_text())
    ] == []


def test_no_guarded_imports() -> None:
    assert [found for path, tree in sources() for found in guarded_imports(path, tree)] == []


def test_tensors_travel_in_batches() -> None:
    assert [breach for path, tree in sources() for breach in single_transfers(path, tree)] == []


def test_names_say_something() -> None:
    assert [path for path, _ in sources() if names_nothing(path)] == []


def test_tests_mirror_the_packages() -> None:
    assert [package for package in packages() if not has_tests(package, TESTS)] == []


def test_architecture_page_names_every_package() -> None:
    assert unnamed(packages(), (ROOT / "docs" / "architecture.md").read_text()) == []


def test_importing_the_package_imports_nothing_else() -> None:
    assert not loaded_by("import megatron_r1") - loaded_by("pass") - {"megatron_r1"}


def test_help_is_instant() -> None:
    command = [sys.executable, "-m", "megatron_r1.cli", "--help"]
    seconds = []  # of a processor: how long it takes to get one says nothing of the help
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    help_run = (
        "import contextlib, megatron_r1.cli\nwith contextlib.suppress(SystemExit): megatron_r1.cli.main(['--help'])"
    )
    assert not loaded_by(help_run) & HEAVY


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("config/load.py", "import megatron_r1.train.rl"),
        ("loss/grpo.py", "from megatron_r1.data import packing"),
        ("loss/grpo.py", "from megatron_r1 import data"),
        ("rollout/fleet.py", "def f():\n    from megatron_r1.model.build import build"),
        ("errors.py", "from megatron_r1.config.load import load"),
        ("train/rl.py", "import megatron_r1.cli"),
        ("train/rl.py", "import megatron_r1.nowhere"),
    ],
)
def test_upward_import_is_caught(path: str, code: str) -> None:
    assert len(upward_imports(path, ast.parse(code))) == 1


def test_downward_import_passes() -> None:
    code = (
        "import megatron_r1.loss.grpo\nfrom megatron_r1.train.policy import Policy\nfrom megatron_r1 import __version__"
    )
    assert upward_imports("train/rl.py", ast.parse(code)) == []


def test_misplaced_upstream_is_caught() -> None:
    code = ast.parse("import vllm.config\nfrom megatron.core import parallel_state\nimport wandb")
    assert len(misplaced_upstream("train/rl.py", code)) == 3
    assert len(misplaced_upstream("train/policy.py", code)) == 2
    assert len(misplaced_upstream("rollout/fleet.py", code)) == 2


def test_over_budget_is_caught() -> None:
    body = "    x = 1\n"
    assert over_budget("a.py", "x = 1\n" * 401) == ["a.py: 401 lines"]
    assert over_budget("a.py", "def f() -> None:\n" + body * 60) == ["a.py:1 f: 61 lines"]
    assert over_budget("a.py", "def f(a, b, c, d, /, e, f, g, *, h, i): ...") == ["a.py:1 f: 9 parameters"]
    assert over_budget("a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n" + "x = 1\n" * 398) == []
    assert over_budget("a.py", "def f() -> None:\n" + body * 59) == []


def test_guarded_import_is_caught() -> None:
    tree = ast.parse("try:\n    if True:\n        import torch\nexcept ImportError:\n    torch = None")
    assert guarded_imports("loss/grpo.py", tree) == ["loss/grpo.py:1"]
    assert guarded_imports("compat/patches.py", tree) == []


def test_single_transfer_is_caught() -> None:
    tree = ast.parse("dist.send(x, 0)\nsocket.send(x)\ndist.batch_isend_irecv([dist.P2POp(dist.isend, x, 0)])")
    assert single_transfers("model/collect.py", tree) == ["model/collect.py:1"]


def test_empty_name_is_caught() -> None:
    assert names_nothing("data/utils.py")
    assert names_nothing("common/io.py")
    assert not names_nothing("data/packing.py")


def test_missing_tests_are_caught(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert not has_tests("data", tmp_path)
    (tmp_path / "data" / "test_packing.py").touch()
    assert has_tests("data", tmp_path)


def test_missing_page_entry_is_caught() -> None:
    assert unnamed(["data", "loss"], "`data` and `megatron_r1/data/tasks`; a loss of words") == ["loss"]


def test_loaded_torch_is_caught() -> None:
    assert {"decimal", "megatron_r1"} <= loaded_by("import decimal, megatron_r1.errors")
