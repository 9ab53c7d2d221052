"""`<output>.partial`: the finished parts of a conversion, what they are parts of, and one process at a time.

At the end the folder is renamed, so the output is whole or absent, and the same command goes on after a kill.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.torch_dist import Record
from megatron_r1.convert.target import Part, Target
from megatron_r1.data.files import sync, write_json
from megatron_r1.errors import ConfigError, DataError

RECORDS = ".parts"
IDENTITY = "identity.json"


class Workspace:
    """The folder that a conversion works in.

    Args:
        output: the folder that will be made.
        identity: what the result depends on; parts made under another one are thrown away.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.output, self.identity = output, identity
        self.folder = output.with_name(f"{output.name}.partial")
        self._records = self.folder / RECORDS

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other conversions to the same output away. Makes the folder.

        Raises:
            ConfigError: another process is at work.
            DataError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise DataError(f"cannot write to {self.output.parent}: {error.strerror}") from error
        try:
            self._lock(descriptor)
            check_free(self.output)  # by a conversion that ended between the first check and the lock
            self._begin()
            yield
        finally:
            os.close(descriptor)

    def done(self, part: Part) -> bool:
        """Whether a part is finished and has not been touched since."""
        file, record = self.folder / part.file, self._record(part)
        return file.exists() and record.exists() and file.stat().st_size == _read(record)["size"]

    def finished(self, part: Part, records: list[Record]) -> None:
        """Note that a part stands in its place."""
        write_json(self._record(part), {"size": (self.folder / part.file).stat().st_size, "records": records})

    def publish(self, target: Target, parts: list[Part], texts: Mapping[str, str]) -> None:
        """Complete the output and give it its name.

        Args:
            target: writes what is no tensor.
            parts: all of them, finished.
            texts: files that stand beside the weights.
        """
        target.finish(self.folder, (record for part in parts for record in _read(self._record(part))["records"]))
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        for path in [*self.folder.rglob("*")]:
            if path.suffix == ".partial":  # of a run that was killed
                path.unlink()
            elif path.is_file() and path.suffix not in {".distcp", ".safetensors"}:  # those are on the disk already
                sync(path)
        for folder in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            sync(folder)
        os.replace(self.folder, self.output)
        sync(self.output.parent)
        shutil.rmtree(self.output / RECORDS)

    def _begin(self) -> None:
        """Keep what was made of the same source with the same options, drop what was made of others.

        Raises:
            ConfigError: the folder holds something that no conversion has left.
        """
        before = self._records / IDENTITY
        if before.exists():
            if (old := _read(before)) == self.identity:
                return
            changed = ", ".join(key for key in self.identity if old.get(key) != self.identity[key])
            print(f"{self.folder} was begun with another {changed}: begins anew", file=sys.stderr)
        elif found := [path.name for path in self.folder.iterdir() if path != self._records]:
            raise ConfigError(f"{self.folder} is needed, but holds {found[0]}, which is of no conversion: remove it")
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._records.mkdir()
        write_json(before, self.identity)

    def _lock(self, descriptor: int) -> None:
        """The lock is on the folder itself, and goes with the process that holds it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is converting to {self.output}; wait for it, or choose another output"
            ) from None
        if not self.folder.exists() or not os.path.samestat(os.fstat(descriptor), self.folder.stat()):
            raise ConfigError(f"another process has just converted to {self.output}")

    def _record(self, part: Part) -> Path:
        return self._records / f"{Path(part.file).name}.json"


def check_free(output: Path) -> None:
    """That nothing stands where the output will.

    Raises:
        ConfigError: something does.
    """
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise ConfigError(f"{output} exists already; remove it, or choose another output")


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove {path.parents[1]} to begin anew") from error
    return value
