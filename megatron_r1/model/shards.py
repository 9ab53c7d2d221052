"""The safetensors files of one model folder, with or without the index that transformers writes for several."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Entry, read_header

INDEX = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth")


def stored_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's files, checked against the index if there is one.

    Only headers are read. Mistral's own `consolidated.safetensors`, the same weights under other names, counts only
    where there is nothing else.

    Raises:
        DataError: no safetensors; a damaged file; the index and the files disagree; a name in two files.
    """
    listed = _read_index(folder / INDEX) if (folder / INDEX).exists() else None
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    present = [name for name in files if not name.startswith("consolidated")] or files
    if listed is None and not present:
        raise DataError(_nothing_to_read(folder))
    _check_files(folder, present, listed)
    entries: dict[str, Entry] = {}
    for file in present if listed is None else sorted(set(listed.values())):
        for name, entry in read_header(folder / file).items():
            if name in entries:
                raise DataError(f"{folder}: {name} is in both {entries[name].path.name} and {file}; which one counts?")
            if listed is not None and listed.get(name) != file:
                raise DataError(
                    f"{folder / file} holds {name}, which {INDEX} looks for in {listed.get(name, 'no file')}"
                )
            entries[name] = entry
    if missing := [(name, file) for name, file in (listed or {}).items() if name not in entries]:
        name, file = missing[0]
        raise DataError(f"{folder / file} has no {name}, which {INDEX} looks for there ({len(missing)} such tensors)")
    return entries


def _check_files(folder: Path, present: list[str], listed: Mapping[str, str] | None) -> None:
    if listed is None:
        return
    needed = set(listed.values())
    if missing := sorted(needed.difference(present)):
        raise DataError(
            f"{folder / INDEX} names {missing[0]}, which is not there ({len(missing)} of {len(needed)} files are "
            "missing): the download is not complete"
        )
    if surplus := sorted(set(present) - needed):
        raise DataError(f"{folder / surplus[0]} is not in {INDEX}: remove the one that is out of date")


def _read_index(path: Path) -> dict[str, str]:
    try:
        files: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not an index of safetensors files: it has no 'weight_map'") from error
    if not isinstance(files, dict) or not all(_is_file_name(file) for file in files.values()):
        raise DataError(f"{path}: its 'weight_map' must give a file name of this folder for every tensor")
    return files


def _is_file_name(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def _nothing_to_read(folder: Path) -> str:
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} holds its weights only as pickles (.bin, .pt), which can run any code when loaded, so they are "
            "not: get the model's safetensors, or, if you trust the files, convert them once with transformers "
            "(from_pretrained, then save_pretrained, which writes safetensors)"
        )
    return f"{folder} holds no .safetensors file; set model.load_weights = false to start at random"
