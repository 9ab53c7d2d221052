"""`import`, `export` and `cast`: one machine from any source to any target."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from megatron_r1 import __version__
from megatron_r1.checkpoint.source import HuggingFaceSource, MegatronSource, Source, open_source
from megatron_r1.config.convert import CastConfig, ConvertConfig, ExportConfig, HuggingFaceConfig, ImportConfig
from megatron_r1.convert.plan import Plan, check, check_room, make_plan, predicted_seconds, room, standing
from megatron_r1.convert.progress import gigabytes
from megatron_r1.convert.target import HuggingFaceTarget, MegatronTarget, Target
from megatron_r1.convert.work import write_parts
from megatron_r1.convert.workspace import Workspace, check_free
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.report.catalogue import duration
from megatron_r1.report.summary import SUMMARY, write_summary

LINEAGE = "conversion.json"
"""In the output: what it was made of, and how."""


def run_import(config: ImportConfig) -> dict[str, Any]:
    """A checkpoint -> a folder that Megatron-LM's `--load` takes, at any parallelism. See `_convert`."""
    check_paths(config)
    source = open_source(config.source, config.config, config.mtp)
    check(source, any_dtype=config.dtype is not None)
    return _convert(config, source, MegatronTarget(source, _dtype(config.dtype)))


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Megatron's checkpoint -> a Hugging Face folder. See `_convert`."""
    check_paths(config)
    source = open_source(config.source, config.config, config.mtp)
    if not isinstance(source, MegatronSource):
        raise ConfigError(
            f"{config.source} is not a Megatron checkpoint; `cast` makes one Hugging Face folder of another"
        )
    return _to_hugging_face(config, source, config.dtype)


def run_cast(config: CastConfig) -> dict[str, Any]:
    """A Hugging Face folder -> one in other numbers. See `_convert`."""
    check_paths(config)
    source = open_source(config.source, None, config.mtp)
    if not isinstance(source, HuggingFaceSource):
        raise ConfigError(f"{config.source} is not a Hugging Face folder; `export` makes one of a Megatron checkpoint")
    return _to_hugging_face(config, source, config.dtype)


def check_paths(config: ConvertConfig) -> None:
    """What can be told before anything is read.

    Raises:
        ConfigError: the output exists, or lies in the source.
        DataError: the source does not exist, or the output's place is read-only.
    """
    source, output = config.source.resolve(), _output(config).resolve()
    if not source.exists():
        raise DataError(f"{config.source} does not exist")
    if output == source or source in output.parents:
        raise ConfigError(f"output {output} is the source or lies in it; the source is never written to")
    if output in source.parents:
        raise ConfigError(f"the source lies in the output {output}; choose another output")
    check_free(output)
    if not os.access(standing(output), os.W_OK | os.X_OK, effective_ids=True):
        raise DataError(f"cannot write to {standing(output)}: no permission, or a read-only file system")


def _to_hugging_face(config: HuggingFaceConfig, source: Source, dtype: str | None) -> dict[str, Any]:
    check(source, any_dtype=dtype is not None)
    quantised = dtype == "fp8"
    target = HuggingFaceTarget(
        source,
        torch.bfloat16 if quantised else _dtype(dtype),
        config.scale_format if quantised else None,
        config.max_shard_bytes,
    )
    return _convert(config, source, target)


def _convert(config: ConvertConfig, source: Source, target: Target) -> dict[str, Any]:
    """Convert, or say what a conversion would take.

    Raises:
        ConfigError: no room on the disk, or another process is converting to the same output.
        DataError: the source is damaged, or the output cannot be written.
        OSError: the disk is full after all.
    """
    output, verb = _output(config), type(config).__name__.removesuffix("Config").lower()
    plan = make_plan(source, target, config.workers)
    figures = _figures(plan, output)
    space = Workspace(output, _identity(config, source))
    needed, free = room(plan, output, written=sum(part.nbytes for part in plan.parts if space.done(part)))
    if config.dry_run:
        figures |= {"seconds": predicted_seconds(plan, output, config.workers), "needed": needed, "free": free}
        print(describe(verb, config, figures))
        return figures
    check_room(output, needed, free)
    begin = time.monotonic()
    with space.held():
        figures["resumed_parts"] = write_parts(plan, space, f"{verb} {config.source}", config.workers)
        figures |= {"seconds": round(time.monotonic() - begin, 3), "peak_memory": peak_memory()}
        named = {LINEAGE: {"verb": verb, **space.identity}} | ({SUMMARY: figures} if not config.folder else {})
        space.publish(target, plan.parts, named)
    return write_summary(config.output, figures)


def describe(verb: str, config: ConvertConfig, figures: dict[str, Any]) -> str:
    """The text of `--dry-run`."""
    memory, largest, needed, free = (gigabytes(figures[key]) for key in ("memory", "largest_tensor", "needed", "free"))
    written = f"{figures['tensors_written']:,} tensors, {figures['bytes_written']:,} bytes"
    lines = [
        f"{verb} {config.source} -> {_output(config)}: {figures['architecture']}, nothing is written now",
        f"  reads    {figures['tensors_read']:,} tensors, {figures['bytes_read']:,} bytes",
        f"  writes   {written} in {figures['parts']:,} parts",
        f"  memory   {memory} at most with {config.workers} workers; the largest tensor has {largest}",
        f"  disk     {needed} needed, {free} free" + (": not enough" if figures["needed"] > figures["free"] else ""),
        f"  time     about {duration(figures['seconds'])}, if the disk reads as fast as it writes",
    ]
    return "\n".join(lines)


def peak_memory() -> int:
    """Most bytes that this process has held, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _figures(plan: Plan, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "architecture": plan.source.hf["architectures"][0],
        "tensors_read": plan.tensors_read,
        "bytes_read": plan.bytes_read,
        "tensors_written": plan.tensors_written,
        "bytes_written": plan.bytes_written,
        "parts": len(plan.parts),
        "largest_tensor": plan.largest_tensor,
        "memory": plan.memory,
    }


def _identity(config: ConvertConfig, source: Source) -> dict[str, Any]:
    """What the result depends on; files by size and time of change, since hashing takes as long as converting."""
    files = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in source.files]
    digest = hashlib.sha256(json.dumps([files, source.hf], sort_keys=True).encode()).hexdigest()
    options = config.model_dump(mode="json", exclude={"source", "output", "folder", "workers", "dry_run"})
    return {
        "megatron_r1": __version__,
        "source": str(config.source.resolve()),
        "source_digest": digest,
        "options": options,
    }


def _output(config: ConvertConfig) -> Path:
    return config.output / config.folder


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None
