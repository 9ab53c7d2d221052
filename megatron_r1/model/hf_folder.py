"""A Hugging Face model folder: `config.json` and safetensors, read lazily and written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.errors import DataError
from megatron_r1.model import fp8
from megatron_r1.model.family import HFConfig
from megatron_r1.model.safetensors_file import Entry, Spec, Writer, read
from megatron_r1.model.shards import INDEX, stored_tensors

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
"""Files of a model folder that training does not change."""

SHARD_BYTES = 5_000_000_000
QUANTIZATION = "quantization_config"

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
"""DeepSeek's own (V3.1's powers of two too), Qwen3's, and powers of two as they are in one byte."""
_UNSCALED = (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def read_config(folder: Path) -> HFConfig:
    """The folder's `config.json`.

    Raises:
        DataError: missing, not JSON, or without an architecture.
    """
    path = folder / "config.json"
    try:
        config: HFConfig = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; a model folder needs a Hugging Face config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise DataError(f"{path} names no architecture (key 'architectures')")
    return config


class Weights(Protocol):
    """A checkpoint's tensors by their Hugging Face names, read when they are asked for."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


class TensorReader:
    """The safetensors of a folder as one lazy dictionary.

    FP8 weights appear dequantised to bfloat16, their scales not at all; `stored` has everything as it stands in the
    files. Only headers are read at first, and all of them checked.

    Raises:
        DataError: no safetensors; a damaged file; the index and the files disagree; a name in two files; an FP8
            weight without a scale of the right shape, a scale without an FP8 weight.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: Mapping[str, Entry] = stored_tensors(folder)
        self.block = _block(folder)
        """Rows and columns of FP8 that share a scale."""
        self._where: dict[str, Entry] = {}
        for name, entry in self.stored.items():
            if name.endswith(fp8.SCALE_SUFFIX):
                self._check_owner(entry)
                continue
            self._where[name] = entry
            if entry.dtype is torch.float8_e4m3fn:
                self._check_scale(entry)
            elif entry.dtype in _UNSCALED:
                raise DataError(f"{entry.path}: {name} is {entry.dtype}; of the FP8 formats only e4m3 is known")

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor's values.

        Raises:
            KeyError: there is no such tensor.
            DataError: the file has changed since, or a scale is not a positive number.
        """
        entry = self._where[name]
        value = read(entry)
        if entry.dtype is not torch.float8_e4m3fn:
            return value
        return fp8.dequantize(value, self._scale(name), torch.bfloat16, self.block)

    def stripes(self, name: str) -> Iterator[torch.Tensor]:
        """`self[name]` in blocks of rows, which begin where blocks of FP8 do, this folder's and DeepSeek's.

        Raises:
            KeyError, DataError: as above.
        """
        entry = self._where[name]
        scale = self._scale(name) if entry.dtype is torch.float8_e4m3fn else None
        for start, stop in self.spec(name).stripes(math.lcm(fp8.BLOCK[0], self.block[0])):
            rows = read(entry.rows(start, stop))
            if scale is not None:
                scales = scale[start // self.block[0] : -(-stop // self.block[0])]
                rows = fp8.dequantize(rows, scales, torch.bfloat16, self.block)
            yield rows

    def spec(self, name: str) -> Spec:
        """Dtype and shape of what `self[name]` gives, from the headers."""
        entry = self._where[name]
        return Spec(torch.bfloat16 if entry.dtype is torch.float8_e4m3fn else entry.dtype, entry.shape)

    def _scale(self, name: str) -> torch.Tensor:
        entry = self.stored[name + fp8.SCALE_SUFFIX]
        scale = read(entry).float()
        bad = ~((scale > 0) & scale.isfinite())
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise DataError(
                f"{entry.path}: {entry.name} holds {scale[tuple(at)].item()} at {at} (and {int(bad.sum()) - 1} more "
                "such values); a scale must be positive and finite: the checkpoint is damaged, get it again"
            )
        return scale

    def _check_owner(self, scale: Entry) -> None:
        name = scale.name.removesuffix(fp8.SCALE_SUFFIX)
        owner = self.stored.get(name)
        if owner is None:
            raise DataError(f"{scale.path}: {scale.name} is a scale, but the checkpoint has no {name}")
        if owner.dtype is not torch.float8_e4m3fn:
            raise DataError(f"{scale.path}: {scale.name} is a scale, but {name} is {owner.dtype} and not FP8 (e4m3)")

    def _check_scale(self, weight: Entry) -> None:
        scale = self.stored.get(weight.name + fp8.SCALE_SUFFIX)
        if scale is None:
            raise DataError(
                f"{weight.path}: {weight.name} is FP8, but the checkpoint has no {weight.name}{fp8.SCALE_SUFFIX}: "
                "a tensor is missing, or it is quantised in another way than by DeepSeek's blocks"
            )
        if scale.dtype not in _SCALE_DTYPES:
            raise DataError(
                f"{scale.path}: {scale.name} is {scale.dtype}; a scale is float32, bfloat16 or float8_e8m0fnu"
            )
        if len(weight.shape) != 2:
            raise DataError(
                f"{weight.path}: {weight.name} is FP8 of shape {list(weight.shape)}; only matrices have blocks"
            )
        expected = fp8.scale_shape(weight.shape, self.block)
        if scale.shape != expected:
            raise DataError(
                f"{scale.path}: {scale.name} has shape {list(scale.shape)}, but {weight.name} {list(weight.shape)} "
                f"in blocks of {list(self.block)} needs {list(expected)}"
            )


def write(
    folder: Path,
    config: HFConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *sources: Path,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder aside, then rename it into place; an older one of that name is replaced.

    One shard at a time is held in memory. If anything fails, the older folder stays and nothing else.

    Args:
        folder: where it will stand.
        config: its `config.json`; without its `quantization_config` if no tensor is FP8.
        tensors: Hugging Face names and values.
        sources: folders whose tokenizer and generation settings are copied beside the weights; the first that has
            a file gives it.
        max_shard_bytes: size of a file's tensors, but for a single tensor that is larger.

    Raises:
        DataError: the disk is full or not writable, or a name comes twice.
    """
    aside, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    try:
        if old.exists() and not folder.exists():
            os.replace(old, folder)  # a run was killed between the two renames below
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        quantized = write_shards(aside, tensors, max_shard_bytes)
        describe(aside, config, *sources, quantized=quantized)
        exchange(aside, folder, old)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def describe(folder: Path, config: HFConfig, *sources: Path, quantized: bool = False) -> None:
    """Write what stands beside weights: `config.json`, tokenizer and generation settings. See `write`.

    Args:
        folder: where the weights are.
        config: its `config.json`; without its `quantization_config` if no tensor is FP8.
        sources: folders whose tokenizer and generation settings are copied.
        quantized: whether a tensor is FP8.

    Raises:
        OSError: it cannot be written.
    """
    if not quantized:
        config = {key: value for key, value in config.items() if key != QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(folder, sources)


def copy_companions(folder: Path, sources: Iterable[Path]) -> None:
    """Copy what stands beside the weights, each file from the first of `sources` that has it."""
    sources = list(sources)
    for name in COMPANIONS:
        if found := next((source / name for source in sources if (source / name).exists()), None):
            shutil.copy2(found, folder / name)


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> bool:
    """Write safetensors files and, if there is more than one, their index. Returns whether a tensor was FP8.

    Raises:
        DataError: the disk is full, or a name comes twice.
    """
    shard_of: dict[str, int] = {}
    total = count = 0
    quantized = False
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        for name in [item[0] for item in shard]:  # no tensor may still have a name here when the list is emptied
            if name in shard_of:
                raise DataError(f"two tensors of the name {name} would be written to {folder}")
            shard_of[name] = number
        specs = _write_shard(folder / f"{number}.safetensors", shard)
        total += sum(spec.nbytes for spec in specs)
        quantized |= any(spec.dtype is torch.float8_e4m3fn for spec in specs)
        count += 1
    files = shard_names(count)
    for number, file_name in enumerate(files):
        os.replace(folder / f"{number}.safetensors", folder / file_name)
    if count > 1:
        write_index(folder, {name: files[number] for name, number in shard_of.items()}, total)
    return quantized


def _write_shard(path: Path, shard: list[tuple[str, torch.Tensor]]) -> Collection[Spec]:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in shard}
    with Writer(path, specs) as file:
        for name, tensor in shard:
            file.put(name, tensor)
    return specs.values()


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors in one list a file; the list is emptied when the next is asked for."""
    shard: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > max_shard_bytes:
            yield shard
            shard.clear()
            held = 0
        shard.append((name, tensor))
        held += tensor.nbytes
        del tensor
    yield shard


def shard_names(count: int) -> list[str]:
    """File names as transformers gives them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: Mapping[str, str], total: int, metadata: Mapping[str, str] | None = None) -> None:
    """Write the index of a folder of several shards.

    Args:
        folder: where the shards stand.
        files: the file of each tensor.
        total: size of all tensors in bytes.
        metadata: more to say of them.
    """
    index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def exchange(new: Path, folder: Path, old: Path) -> None:
    """Rename `new` to `folder`, whose older contents go."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed before it removed it
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _block(folder: Path) -> tuple[int, int]:
    """Rows and columns that share a scale, from `config.json` where it says so."""
    if not (folder / "config.json").exists():
        return fp8.BLOCK
    quantization = read_config(folder).get(QUANTIZATION) or {}
    if not isinstance(quantization, dict):
        raise DataError(f"{folder / 'config.json'}: {QUANTIZATION} = {quantization!r} must be an object")
    size = quantization.get("weight_block_size") or fp8.BLOCK
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise DataError(f"{folder / 'config.json'}: weight_block_size = {size!r} must be two whole numbers above 0")
    return size[0], size[1]
