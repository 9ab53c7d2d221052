"""Checksums of a checkpoint's files: `manifest.json`, written last, says what each has to be.

XXH3 with 128 bits finds what disks, networks and killed processes do; it is no protection against somebody who forges
files. Ranks share the work: each hashes some of the files.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megatron_r1.data.files import sync

NAME = "manifest.json"
_BLOCK = 2**22
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
    manifest = _read(folder)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = [manifest] if isinstance(manifest, str) else _mismatches(folder, manifest, sorted(manifest)[rank::ranks])
    found: list[list[str]] = [[] for _ in range(ranks)]
    dist.all_gather_object(found, own)
    return sorted({problem for part in found for problem in part})


def in_words(found: list[str]) -> str:
    """Problems in one line."""
    rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + rest


def _mismatches(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    return [found for name in names if (found := _mismatch(folder / name, manifest[name]))]


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
