r"""Content hashes of files and folders, SHA-256, so that `sha256sum` can check them.

The hash of a folder is that of what `sha256sum` prints for its files in the order of their names:

    cd FOLDER && find . -type f -not -path '*/.*' -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum

Megatron names an indexed dataset by what `.bin` and `.idx` have in common; such a name means these two files.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_r1.data.files import write_json

DATASET_ENDINGS = (".bin", ".idx")
SETTLED_NS = 50_000_000
"""A file that was written this recently may change again within one tick of the clock that dates it, so its hash is
not remembered."""


def files_of(path: Path) -> dict[str, Path]:
    """Name -> file of everything that a path means; empty if there is nothing. Hidden files do not count."""
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        found: dict[str, Path] = {}
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = [Path(folder, name) for name in names if not name.startswith(".")]
            found |= {file.relative_to(path).as_posix(): file for file in below if file.is_file()}
        return dict(sorted(found.items()))
    pair = [path.with_name(path.name + ending) for ending in DATASET_ENDINGS]
    return {file.name: file for file in pair} if all(file.is_file() for file in pair) else {}


class Hashes:
    """Hashes that are remembered by path, size and time of change, in one file."""

    FILE = ".hashes.json"
    """Its usual name in the output folder of a recipe."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, tuple[int, int, str]] = {}
        self._changed = False
        with suppress(OSError, ValueError, TypeError, AttributeError):  # it only saves time
            self._known = {path: tuple(entry) for path, entry in json.loads(memory.read_text()).items()}

    def file(self, path: Path) -> str:
        """SHA-256 of a file's content."""
        status, name = path.stat(), str(path.absolute())
        stamp = (status.st_size, status.st_mtime_ns)
        known = self._known.get(name)
        if known and known[:2] == stamp:
            return known[2]
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
            self._known[name], self._changed = (*stamp, digest), True
        return digest

    def path(self, path: Path) -> str | None:
        """The hash of a file, a folder or an indexed dataset; None if there is none."""
        found = files_of(path)
        return self.file(path) if path.is_file() else self.together(found.items()) if found else None

    def together(self, files: Iterable[tuple[str, Path]]) -> str:
        """The hash of a folder that holds these files."""
        return folder_hash((name, self.file(file)) for name, file in files)

    def save(self) -> None:
        """Remember for the next process."""
        if self._changed:
            write_json(self._memory, {path: entry for path, entry in self._known.items() if Path(path).exists()})
            self._changed = False


def folder_hash(files: Iterable[tuple[str, str]]) -> str:
    """The hash of a folder from the names of its files and their hashes."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
