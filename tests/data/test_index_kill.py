"""`data index` that is killed, and whose workers are."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.data import pieces
from megatron_r1.data.indexed import build
from tests.data import index_program
from tests.data.test_indexed import datasets

REPEATS = 12
"""So that it takes a second or two."""


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    text = (corpus / "train.jsonl").read_text()
    lines = [
        line.replace('"text": "', f'"text": "{copy} ') + "\n" for copy in range(REPEATS) for line in text.splitlines()
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    return tmp_path


def start(folder: Path, tokenizer: Path) -> subprocess.Popen[str]:
    """The command, when it has finished some parts."""
    arguments = [sys.executable, "-m", "tests.data.index_program", str(folder), str(tokenizer), "2"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while len(finished(folder)) < 10:
        assert process.poll() is None, "it has ended before there was anything to interrupt"
        time.sleep(0.001)
    return process


def finished(folder: Path) -> list[Path]:
    return sorted((folder / "index/.parts").glob("[!.]*.npz"))


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # nobody may ask how an orphan has ended
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, processes))


def test_killed_it_leaves_nobody_and_goes_on(
    folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(folder, tokenizer_folder)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert gone(workers)
    assert not datasets(folder / "index")
    kept = finished(folder)
    monkeypatch.setattr(pieces, "_SMALLEST", index_program.SMALLEST)
    config = index_program.config(folder, tokenizer_folder, 3)
    elsewhere = [config.model_copy(update={"output": folder / name}) for name in ("undisturbed", "marked")]
    shutil.copytree(folder / "index/.parts", folder / "marked/.parts")
    expected = datasets_of(elsewhere[0])
    assert datasets_of(config) == expected
    # What was finished is used: a part that is changed behind its back shows in the result.
    marked = folder / "marked/.parts" / kept[0].name.replace(".npz", ".train.bin")
    size = marked.stat().st_size
    marked.write_bytes(b"\xff" * size)
    found = datasets_of(elsewhere[1])["web/train.bin"]
    assert found.count(b"\xff" * size) == 1
    assert sum(a != b for a, b in zip(found, expected["web/train.bin"], strict=True)) <= size


def datasets_of(config: index_program.IndexConfig) -> dict[str, bytes]:
    build(config)
    return datasets(config.output)


def test_a_killed_worker_ends_it_with_a_reason(folder: Path, tokenizer_folder: Path) -> None:
    process = start(folder, tokenizer_folder)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[0].kill()
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "a worker of `data index` was killed" in error
    assert gone(workers)
    assert not datasets(folder / "index")


def test_interrupted_it_ends_at_once(folder: Path, tokenizer_folder: Path) -> None:
    process = start(folder, tokenizer_folder)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert gone(workers)
