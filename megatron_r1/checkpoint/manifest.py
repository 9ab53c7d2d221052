"""Checksums of a checkpoint's files: `manifest.json`, written last, says what each has to be.

XXH3 with 128 bits finds what disks, networks and killed processes do; it is no protection against somebody who forges
files. Ranks share the work: each hashes some of the files, several at once.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megatron_r1.data.files import sync
from megatron_r1.errors import DataError

NAME = "manifest.json"
_BLOCK = 2**22
_THREADS = 4
"""Of one process that hash files; reading and XXH3 release Python's lock."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as it was written."""

    bytes: int
    xxh3_128: str


Manifest = dict[str, Entry]
"""Name of a file -> what it has to be."""


def entry_of(path: Path) -> Entry:
    """What a file is now.

    Raises:
        OSError: it cannot be read.
    """
    digest, size, block = xxhash.xxh3_128(), 0, bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
    return Entry(size, digest.hexdigest())


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; from here on the folder is a whole checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    with (folder / NAME).open("wb") as file:
        file.write(_encoded(manifest))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, each with the name of its file; empty = it is whole. All ranks call it together.

    Every rank reads its share of the files, and all return the same.
    """
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, problems_of_share(folder, dist.get_rank(), dist.get_world_size()))
    return sorted({problem for part in found for problem in part})


def problems_of_share(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """The same of one rank's share of the files, without a process group; of all files where there is one rank."""
    manifest = _read(folder)
    return [manifest] if isinstance(manifest, str) else _mismatches(folder, manifest, sorted(manifest)[rank::ranks])


def stands_in(folder: Path) -> bool:
    """Whether a checkpoint says what its files have to be, as those of training do and no other program's."""
    return (folder / NAME).is_file()


def refuse_damaged(folder: Path, together: bool = False) -> None:
    """That every file of a training checkpoint is what was written; headers tell nothing of numbers. Reads all of it.

    Args:
        folder: a checkpoint of any format; what has no manifest passes.
        together: all ranks call it, and share the work.

    Raises:
        DataError: not so.
    """
    found = (problems(folder) if together else problems_of_share(folder)) if stands_in(folder) else []
    if found:
        raise DataError(f"{folder} is damaged ({in_words(found)}): restore the files, or take another checkpoint")


def in_words(found: list[str]) -> str:
    """Problems in one line."""
    rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + rest


def _mismatches(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found in pool.map(lambda name: _mismatch(folder / name, manifest[name]), names) if found]


def _mismatch(path: Path, due: Entry) -> str:
    try:
        size = path.stat().st_size
        if size != due.bytes:
            return f"{path.name} has {size:,} bytes instead of {due.bytes:,}"
        same = entry_of(path) == due
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return "" if same else f"{path.name} has been altered: its checksum is another"


def _read(folder: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    try:
        content = (folder / NAME).read_bytes()
        manifest = {name: Entry(**entry) for name, entry in json.loads(content)["files"].items()}
        return manifest if _encoded(manifest) == content else f"{NAME} has been altered"
    except FileNotFoundError:
        return f"{NAME} is missing"
    except OSError as error:
        return f"{NAME} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} has been altered or cut off"


def _encoded(manifest: Manifest) -> bytes:
    """The one way to write a manifest down: any other byte is damage."""
    files = {name: {"bytes": one.bytes, "xxh3_128": one.xxh3_128} for name, one in sorted(manifest.items())}
    tree: dict[str, Any] = {"files": files, "xxh3_128": xxhash.xxh3_128_hexdigest(json.dumps(files).encode())}
    return (json.dumps(tree, indent=1) + "\n").encode()
