"""What the headers of a checkpoint say, whatever its format: every tensor as it stands, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.source import (
    Source,
    check_config,
    hf_shapes,
    megatron_checkpoint,
    not_a_folder,
    open_source,
)
from megatron_r1.checkpoint.torch_dist import TorchDistReader
from megatron_r1.errors import DataError
from megatron_r1.model.build import rules
from megatron_r1.model.family import HFConfig, Rule
from megatron_r1.model.fp8 import SCALE_SUFFIX
from megatron_r1.model.hf_folder import QUANTIZATION, TensorReader, read_config
from megatron_r1.model.safetensors_file import Entry, Spec, read_header
from megatron_r1.model.sharding import layout
from megatron_r1.model.shards import stored_tensors

Format = Literal["huggingface", "config only", "megatron torch_dist", "gguf"]


@dataclass(frozen=True)
class Stored:
    """A tensor as it stands in a file."""

    name: str
    spec: Spec
    file: str = ""


@dataclass
class Contents:
    """A checkpoint, seen from its headers."""

    format: Format
    folder: Path
    """Where tokenizer and generation settings stand."""
    hf: HFConfig | None = None
    """`config.json`; None where a Megatron checkpoint has none."""
    files: list[Path] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    """Megatron's name of each tensor that a rule makes -> its number of elements."""
    problems: list[str] = field(default_factory=list)
    source: Source | None = None
    """What it was read through, whose folder may go with it."""


def read_contents(path: Path, config: Path | None, mtp: bool, check: bool) -> Contents:
    """The headers of a checkpoint of any kind.

    Args:
        path: see `InspectConfig`.
        config: whose config.json a Megatron checkpoint has.
        mtp: False = a Megatron checkpoint without the multi-token-prediction layers of its config.json.
        check: compare all shapes with those that config.json makes, and a training checkpoint's files with its
            manifest.

    Raises:
        DataError: there is nothing at `path` that is a checkpoint.
    """
    if path.suffix == ".gguf":
        return _of_source(open_source(path), "gguf")
    if not path.is_dir():
        raise not_a_folder(path)
    checkpoint = megatron_checkpoint(path)
    if checkpoint is None:
        check_config(path)
        return _of_folder(path, check)
    found = _of_checkpoint(checkpoint, path, config, mtp)
    if check and manifest.stands_in(path):
        found.problems += manifest.problems_of_share(path)
    return found


def _of_checkpoint(checkpoint: Path, path: Path, config: Path | None, mtp: bool) -> Contents:
    """A Megatron checkpoint, with its model where there is a config.json."""
    try:
        return _of_source(open_source(path, config, mtp), "megatron torch_dist")
    except DataError as error:
        keys = TorchDistReader(checkpoint).keys
        files = [file for file in sorted(checkpoint.iterdir()) if file.is_file()]
        stored = [Stored(name, spec) for name, spec in keys.items()]
        return Contents("megatron torch_dist", path, None, files, stored, problems=[str(error)])


def _of_source(source: Source, kind: Format) -> Contents:
    """A checkpoint whose shapes a source has compared with config.json's."""
    found = Contents(kind, source.folder, source.hf, list(source.files), source=source)
    for rule in source.rules:
        if missing := [name for name in rule.hf if name not in source]:
            found.problems += [f"{name} is missing" for name in missing]
            continue
        try:
            shapes = [source.spec(name).shape for name in rule.hf]
        except DataError as error:
            found.problems.append(str(error))
            continue
        found.sizes[rule.megatron] = sum(_elements(shape) for shape in shapes)
        names = rule.hf if len(rule.hf) == len(source.stored(rule)) else [rule.megatron] * len(source.stored(rule))
        found.stored += [Stored(name, spec) for name, spec in zip(names, source.stored(rule), strict=True)]
    found.problems += [f"{name} is known to no rule of {source.hf['architectures'][0]}" for name in source.unknown()]
    return found


def _of_folder(folder: Path, check: bool) -> Contents:
    """A Hugging Face folder; config.json alone is enough."""
    hf = read_config(folder)
    found = Contents("huggingface", folder, hf)
    entries = _entries(folder, found)
    found.files = sorted({entry.path for entry in entries.values()})
    found.stored = [Stored(entry.name, Spec(entry.dtype, entry.shape), entry.path.name) for entry in entries.values()]
    try:
        table = rules(hf)
    except DataError as error:
        found.problems.append(str(error))
        return found
    if not entries and not found.problems:
        found.format = "config only"
    if foreign_quantization(hf):
        _by_modules(found, table, entries)
        return found
    if check or found.format == "config only":
        _compare_shapes(found, table, entries)
    if entries:
        _by_rules(found, table, entries)
    return found


def _entries(folder: Path, found: Contents) -> dict[str, Entry]:
    """Every tensor of the readable files; what is wrong with the others, or with the index, goes to the problems."""
    files = sorted(folder.glob("*.safetensors"))
    weights = [*files, *folder.glob("*.safetensors.index.json"), *folder.glob("*.bin"), *folder.glob("*.pt")]
    if not weights:
        return {}
    try:
        return dict(stored_tensors(folder) if foreign_quantization(found.hf) else TensorReader(folder).stored)
    except DataError as error:
        found.problems.append(str(error))
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            entries |= read_header(file)
        except DataError as error:
            found.problems += [str(error)] if str(error) not in found.problems else []
    return entries


def foreign_quantization(hf: HFConfig | None) -> str | None:
    """How another program has quantised a model, in whose own names and shapes it is stored; None if none has."""
    settings = (hf or {}).get(QUANTIZATION) or {}
    method = settings.get("quant_method", "unknown") if settings else "fp8"
    return None if method == "fp8" else f"{method} {settings.get('quant_algo', '')}".strip()


def _by_modules(found: Contents, rules: Sequence[Rule], entries: dict[str, Entry]) -> None:
    """What can be told of numbers that are packed and scaled in another program's way: the modules."""
    assert found.hf
    places = layout(found.hf).places
    found.sizes = {rule.megatron: _elements(places[rule.megatron].shape) for rule in rules}
    due = {_module(name) for rule in rules for name in rule.hf}
    known = due | {_module(name) for rule in rules for name in (*rule.copies, *rule.redundant)}
    stored = {_module(name) for name in entries}
    found.problems += [f"all of {module} is missing" for module in sorted(due - stored)]
    found.problems += [f"{module} is known to no rule of {found.hf['architectures'][0]}" for module in stored - known]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _by_rules(found: Contents, rules: Sequence[Rule], entries: dict[str, Entry]) -> None:
    """Sizes of what is there; what is missing and what is too much."""
    known: set[str] = set()
    for rule in rules:
        known.update(rule.hf, rule.copies, rule.redundant)
        missing = [name for name in rule.hf if name not in entries]
        found.problems += [f"{name} is missing" for name in missing]
        if not missing:
            found.sizes[rule.megatron] = sum(_elements(entries[name].shape) for name in rule.hf)
    hf = found.hf or {}
    settings = hf.get("quantization_config") or {}
    quantized = any(entry.dtype is torch.float8_e4m3fn for entry in entries.values())
    for name in entries:
        if name not in known and name.removesuffix(SCALE_SUFFIX) not in known:
            found.problems.append(f"{name} is known to no rule of {hf['architectures'][0]}")
    if settings.get("quant_method") == "fp8" and not quantized:
        found.problems.append("config.json has a quantization_config, but no tensor is FP8")
    if quantized and not settings:
        found.problems.append("tensors are FP8, but config.json has no quantization_config")


def _compare_shapes(found: Contents, rules: Sequence[Rule], entries: dict[str, Entry]) -> None:
    """What config.json makes of each tensor; the sizes where nothing is stored."""
    assert found.hf
    try:
        places = layout(found.hf).places
    except DataError as error:
        found.problems.append(str(error))
        return
    for rule in rules:
        shapes = hf_shapes(rule, places[rule.megatron])
        if not entries:
            found.sizes[rule.megatron] = _elements(places[rule.megatron].shape)
        for name, shape in zip(rule.hf, shapes, strict=True):
            if name in entries and entries[name].shape != shape:
                found.problems.append(
                    f"{name} has shape {list(entries[name].shape)}, but config.json makes it {list(shape)}"
                )


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
