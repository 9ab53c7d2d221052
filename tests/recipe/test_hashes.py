"""Content hashes against coreutils; what is remembered, and what is not."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from megatron_r1.recipe import hashes
from megatron_r1.recipe.hashes import Hashes, files_of

DAY = 86_400


def shell(command: str, where: Path) -> str:
    return subprocess.run(
        ["bash", "-c", command], cwd=where, capture_output=True, text=True, check=True
    ).stdout.split()[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in ("b.bin", "a.json", "B.txt", "deep/er/x y.txt", ".hidden", ".git/config", "deep/é"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content of {name}")
    return folder


def test_a_file_and_a_folder_as_sha256sum_has_them(folder: Path, tmp_path: Path) -> None:
    known = Hashes(tmp_path / "memory.json")
    assert known.path(folder / "b.bin") == shell("sha256sum b.bin", folder)
    [command] = [line.strip() for line in str(hashes.__doc__).splitlines() if "find" in line]
    command = command.removeprefix("cd FOLDER && ")
    assert known.path(folder) == shell(command, folder)


def test_a_dataset_is_its_two_files(folder: Path, tmp_path: Path) -> None:
    known = Hashes(tmp_path / "memory.json")
    assert known.path(folder / "b") is None
    (folder / "b.idx").write_text("index")
    assert known.path(folder / "b") == shell("sha256sum b.bin b.idx | sha256sum", folder)


def test_nothing_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    known = Hashes(tmp_path / "memory.json")
    assert known.path(tmp_path / "none") is None
    assert known.path(tmp_path / "empty") is None
    assert files_of(tmp_path / "empty") == {}


def test_hashes_are_remembered_by_size_and_time(tmp_path: Path) -> None:
    """A change that leaves both as they were goes unseen: that is what is remembered by. Any other is seen."""
    file, memory = tmp_path / "file", tmp_path / "memory.json"
    file.write_text("one")
    long_ago = time.time() - DAY
    os.utime(file, (long_ago, long_ago))
    first = Hashes(memory)
    before = first.file(file)
    first.save()
    file.write_text("two")
    os.utime(file, (long_ago, long_ago))
    assert Hashes(memory).file(file) == before
    os.utime(file, (long_ago, long_ago + 1))
    assert Hashes(memory).file(file) == shell("sha256sum file", tmp_path) != before


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "file"
    known = Hashes(tmp_path / "memory.json")
    soon = time.time() + 1  # as if it were written while we look
    file.write_text("one")
    os.utime(file, (soon, soon))
    before = known.file(file)
    file.write_text("two")
    os.utime(file, (soon, soon))
    assert known.file(file) != before


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"/x": 3}'])
def test_a_broken_memory_is_no_memory(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory.json").write_text(text)
    (tmp_path / "file").write_text("one")
    assert Hashes(tmp_path / "memory.json").file(tmp_path / "file") == shell("sha256sum file", tmp_path)
