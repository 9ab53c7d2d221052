"""What a conversion will do, checked before its first byte: every tensor, every shape, every byte, memory and time."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.checkpoint.source import Source, hf_shapes
from megatron_r1.convert.progress import gigabytes
from megatron_r1.convert.target import Part, Target
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.family import Rule
from megatron_r1.model.fp8 import BLOCK, dequantize
from megatron_r1.model.safetensors_file import Spec

BUDGET = 2**30
"""Bytes of tensors that all workers together hold; a rule that needs more is converted alone."""
BASE = 2**30
"""Bytes of a process that holds no tensor: Python, torch, Megatron, the plan of the largest models."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_STRIPES = 6
"""How many of a size a stripe takes: as stored, as read, as rounded, and the float32 numbers of quantising."""
_SHOWN = 5
_ROOM = 2**24
"""Bytes for headers, index, metadata and tokenizer."""
_SAMPLE_BYTES = 2**26
_SAMPLES = 8  # a disk's own cache takes the first


@dataclass(frozen=True)
class Plan:
    """A conversion that can begin."""

    source: Source
    target: Target
    parts: list[Part]
    tensors_read: int
    tensors_written: int
    bytes_read: int
    bytes_written: int
    largest_tensor: int
    """Bytes of the largest, as it is read."""
    memory: int
    """Predicted peak of the process, bytes."""


def make_plan(source: Source, target: Target, workers: int) -> Plan:
    """Assign every tensor.

    Raises:
        DataError: the source does not fit its `config.json`; see `check`.
    """
    stored = [spec for rule in source.rules for spec in source.stored(rule)]
    costs = sorted((cost(source, target, rule) for rule in source.rules), reverse=True)
    return Plan(
        source=source,
        target=target,
        parts=target.parts(),
        tensors_read=len(stored),
        tensors_written=sum(target.count(rule) for rule in source.rules),
        bytes_read=sum(spec.nbytes for spec in stored),
        bytes_written=sum(target.nbytes(rule) for rule in source.rules),
        largest_tensor=max(source.spec(name).nbytes for rule in source.rules for name in rule.hf),
        memory=BASE + max(costs[0], min(BUDGET, sum(costs[:workers]))),
    )


def cost(source: Source, target: Target, rule: Rule) -> int:
    """Bytes that a rule takes while it is converted: a few stripes of rows, or where tensors are joined or cut all of
    it as stored, as read, and once more as joined or rounded.
    """
    specs = [source.spec(name) for name in rule.hf]
    if source.striped(rule) and target.striped(rule):
        return _STRIPES * max(map(_stripe_nbytes, specs))
    return 2 * sum(spec.nbytes for spec in specs) + max(spec.nbytes for spec in source.stored(rule))


def check(source: Source, any_dtype: bool) -> None:
    """Every tensor of the model is there, nothing else is, and each has the shape and dtype that is due.

    Args:
        source: the checkpoint.
        any_dtype: tensors may have any floating dtype, because all are rounded to one.

    Raises:
        DataError: not so.
    """
    _check_names(source)
    places = source.places.places
    for rule in source.rules:
        for name, due in zip(rule.hf, hf_shapes(rule, places[rule.megatron]), strict=True):
            spec = source.spec(name)
            if spec.shape != due:
                raise DataError(f"{name} has shape {list(spec.shape)}, but config.json makes it {list(due)}")
            if spec.dtype not in _FLOATS:
                raise DataError(f"{name} holds {_name(spec.dtype)}; weights are {' or '.join(map(_name, _FLOATS))}")
    if not any_dtype:
        _check_dtypes(source)


def room(plan: Plan, output: Path, written: int) -> tuple[int, int]:
    """Bytes that are still to be written, and bytes that the disk has free.

    Args:
        plan: the conversion.
        output: its output folder.
        written: bytes that an earlier run has written.
    """
    return plan.bytes_written - written + _ROOM, shutil.disk_usage(standing(output)).free


def check_room(output: Path, needed: int, free: int) -> None:
    """That the disk has room for what is still to be written.

    Raises:
        ConfigError: it has not.
    """
    if needed > free:
        raise ConfigError(
            f"{output} needs {gigabytes(needed)} ({needed:,} bytes), but its disk has {gigabytes(free)} free: "
            "make room, or choose another output"
        )


def predicted_seconds(plan: Plan, output: Path, workers: int) -> float:
    """Time of the conversion, if source and target stand on one disk and it reads as fast as it writes.

    The disk is measured with a nameless file, the processor with one tensor.
    """
    block = torch.empty(_SAMPLE_BYTES, dtype=torch.uint8).random_(256)
    with tempfile.TemporaryFile(dir=standing(output)) as file:
        count = max(1, min(plan.bytes_written // _SAMPLE_BYTES, _SAMPLES))
        begin = time.perf_counter()
        for _ in range(count):
            file.write(memoryview(block.numpy()))
        file.flush()
        os.fsync(file.fileno())
        disk = count * _SAMPLE_BYTES / (time.perf_counter() - begin)
    weight = torch.ones(2048, 7168).to(torch.float8_e4m3fn)
    begin = time.perf_counter()
    dequantize(weight, torch.ones(16, 56))
    processor = 2 * weight.numel() / (time.perf_counter() - begin)
    stored = (spec for rule in plan.source.rules for spec in plan.source.stored(rule))
    quantised = any(spec.dtype is torch.float8_e4m3fn for spec in stored)
    computing = plan.bytes_written / processor / workers if quantised else 0.0
    return max((plan.bytes_read + plan.bytes_written) / disk, computing)


def standing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _stripe_nbytes(spec: Spec) -> int:
    _, rows = next(spec.stripes(BLOCK[0]))
    return spec.nbytes * rows // max(1, spec.shape[0])


def _check_names(source: Source) -> None:
    places = source.places.places
    rules = {rule.megatron for rule in source.rules}
    if unruled := sorted(rules.symmetric_difference(places)):
        raise DataError(f"rules and model differ in {_some(unruled)}: the family is wrong for this config.json")
    missing = [name for rule in source.rules for name in rule.hf if name not in source]
    if missing:
        raise DataError(f"the checkpoint lacks {_some(missing)}{_mtp_hint(source, missing)}")
    if unknown := source.unknown():
        raise DataError(f"the checkpoint holds {_some(unknown)}, which config.json has no place for")


def _mtp_hint(source: Source, missing: Sequence[str]) -> str:
    """What to do where nothing but the MTP layers is missing, as after transformers has saved a model."""
    trunk = {name for rule in _trunk_rules(source) for name in rule.hf}
    if trunk.isdisjoint(missing):
        return ", all of multi-token-prediction layers; mtp = false (--no-mtp) converts the model without these"
    return ""


def _trunk_rules(source: Source) -> list[Rule]:
    return [rule for rule in source.rules if not rule.megatron.startswith("mtp.")]


def _check_dtypes(source: Source) -> None:
    """That a checkpoint which keeps its numbers has them all in the dtype that `config.json` names.

    Raises:
        DataError: not so.
    """
    named = source.hf.get("dtype") or source.hf.get("torch_dtype")
    due = getattr(torch, str(named), None) if named else source.spec(source.rules[0].hf[0]).dtype
    for rule in source.rules:
        for name in rule.hf:
            found = source.spec(name).dtype
            if found != due and not (rule.float32 and found is torch.float32):
                raise DataError(
                    f"{name} is stored in {_name(found)}, but config.json says {named or _name(due)}; give --dtype to "
                    "convert all tensors to one, or correct config.json"
                )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    count = f"{len(names):,} tensors" if len(names) > 1 else "one tensor"
    return f"{count}: {shown}{', ...' if len(names) > _SHOWN else ''}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
