"""The import hook fits the megatron-core that is installed: every rule and every fix still has something to act on."""

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_r1.compat import megatron_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA is present the hook does nothing")


def megatron_core() -> Path:
    spec = importlib.util.find_spec("megatron.core")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def sources() -> dict[str, str]:
    folder = megatron_core()
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


VERSIONS = ("0.16.1", "0.19.2")
ONLY_OF = {"triton of paged stash": ("0.19.2",)}


def test_a_version_that_the_rules_were_written_for() -> None:
    assert importlib.metadata.version("megatron-core") in VERSIONS


@pytest.mark.parametrize("number", range(len(megatron_cpu.RULES)), ids=[name for name, _, _ in megatron_cpu.RULES])
def test_every_rule_still_matches(number: int) -> None:
    """On the text as the rules before it leave it."""
    name, pattern, _ = megatron_cpu.RULES[number]
    texts = list(sources().values())
    for _, earlier, replacement in megatron_cpu.RULES[:number]:
        texts = [earlier.sub(replacement, text) for text in texts]
    found = any(pattern.search(text) for text in texts)
    assert found or importlib.metadata.version("megatron-core") not in ONLY_OF.get(name, VERSIONS)


def test_rewriting_leaves_line_numbers_and_syntax() -> None:
    for name, text in sources().items():
        rewritten = megatron_cpu.rewrite(text)
        assert rewritten.count("\n") == text.count("\n"), name
        if rewritten != text:
            compile(rewritten, name, "exec")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x = torch.cuda.current_device()", "x = _megatron_r1_cuda.current_device()"),
        ("from torch.cuda.amp import y", "from torch.cuda.amp import y"),
        ("if p.type() == 'torch.cuda.FloatTensor':", "if p.type() == 'torch.FloatTensor':"),
        ("torch.zeros(3, device='cuda')", "torch.zeros(3, device='cpu')"),
        ("t.cuda(non_blocking=True)", "t"),
        ("t.to(torch.device('cuda'))", "t.to(torch.device('cpu'))"),
        (
            '"""MoE paged stash."""\n\nimport triton\nimport triton.language as tl\n',
            '"""MoE paged stash."""\n\ntriton = _megatron_r1_cuda.Triton\ntl = triton\n',
        ),
    ],
)
def test_what_a_rule_makes_of_a_line(before: str, after: str) -> None:
    assert megatron_cpu.rewrite(before) == after


def test_enabling_twice_installs_one_hook() -> None:
    code = """
import sys
from megatron_r1.compat import megatron_cpu
before = len(sys.meta_path)
megatron_cpu.enable()
megatron_cpu.enable()
print(len(sys.meta_path) - before)
"""
    assert in_a_fresh_interpreter(code) == "1"


def test_too_late_is_an_error() -> None:
    code = """
import sys, types
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
from megatron_r1.compat import megatron_cpu
try:
    megatron_cpu.enable()
except RuntimeError as error:
    print(error)
"""
    assert "megatron.core was imported before" in in_a_fresh_interpreter(code)


def test_what_a_newer_version_says_of_an_older_way_is_unsaid_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    megatron_cpu.enable()
    for name, words in megatron_cpu.UNSAID.items():
        logging.getLogger(name).warning("%s. Please use another", words)
        logging.getLogger(name).warning("The disk is full")
    assert [record.getMessage() for record in caplog.records] == ["The disk is full"] * len(megatron_cpu.UNSAID)


def test_torch_itself_is_untouched() -> None:
    code = """
import torch
before = {name: id(value) for name, value in vars(torch.cuda).items()}
from megatron_r1.compat import megatron_cpu
megatron_cpu.enable()
import megatron.core.parallel_state
print([name for name, value in before.items() if id(vars(torch.cuda)[name]) != value], torch.cuda.is_available())
"""
    assert in_a_fresh_interpreter(code) == "[] False"
