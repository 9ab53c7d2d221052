"""`import`, `export` and `cast`: one machine from any source to any target."""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_r1 import __version__
from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.source import MegatronSource, Source, megatron_checkpoint, open_source
from megatron_r1.config.card import CardConfig
from megatron_r1.config.convert import CastConfig, ConvertConfig, ExportConfig, HuggingFaceConfig, ImportConfig
from megatron_r1.config.modelopt import QuantizeConfig
from megatron_r1.convert.ancestry import find_lineage
from megatron_r1.convert.card import CARD, Conversion, card
from megatron_r1.convert.plan import Plan, check, check_room, make_plan, predicted_seconds, room, standing
from megatron_r1.convert.progress import gigabytes
from megatron_r1.convert.target import HuggingFaceTarget, MegatronTarget, Target
from megatron_r1.convert.work import write_parts
from megatron_r1.convert.workspace import Workspace, check_free
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.family import HFConfig
from megatron_r1.report.catalogue import duration
from megatron_r1.report.summary import SUMMARY, write_summary
from megatron_r1.wording import counted

LINEAGE = "conversion.json"
"""In the output: what it was made of, and how."""


def run_import(config: ImportConfig) -> dict[str, Any]:
    """A checkpoint -> a folder that Megatron-LM's `--load` takes, at any parallelism. See `_convert`."""
    check_paths(config)
    _check_content(config)
    source = open_source(config.source, config.config, config.mtp)
    _say_what_is_left_out(config, source)
    check(source, any_dtype=config.dtype is not None)
    return _convert(config, source, MegatronTarget(source, _dtype(config.dtype)))


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Megatron's checkpoint -> a Hugging Face folder. See `_convert`."""
    check_paths(config)
    _check_content(config)
    source = open_source(config.source, config.config, config.mtp)
    if not isinstance(source, MegatronSource):
        raise ConfigError(
            f"{config.source} is not a Megatron checkpoint; `cast` makes a Hugging Face folder of another, or of GGUF"
        )
    if rows := source.padding():
        print(f"{config.source}: leaves out the last {counted(rows, 'row')} of its vocabulary, padding")
    _say_what_is_left_out(config, source)
    return _to_hugging_face(config, source, config.dtype)


def run_cast(config: CastConfig) -> dict[str, Any]:
    """A Hugging Face folder or a GGUF file -> a Hugging Face folder in other numbers. See `_convert`."""
    check_paths(config)
    if config.source.is_dir() and megatron_checkpoint(config.source):
        raise ConfigError(f"{config.source} is a Megatron checkpoint; `export` makes a Hugging Face folder of it")
    source = open_source(config.source, None, config.mtp)
    return _to_hugging_face(config, source, config.dtype)


def check_paths(config: ConvertConfig | QuantizeConfig) -> None:
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


def _check_content(config: ConvertConfig) -> None:
    """That a training checkpoint is whole; a dry run reads headers only.

    Raises:
        DataError: it is not.
    """
    if not config.dry_run:
        manifest.refuse_damaged(config.source)


def _say_what_is_left_out(config: ConvertConfig, source: Source) -> None:
    if isinstance(source, MegatronSource) and source.lacks_mtp:
        print(f"{config.source} has none of the multi-token-prediction layers of its config.json: leaves them out")


def _to_hugging_face(config: HuggingFaceConfig, source: Source, dtype: str | None) -> dict[str, Any]:
    check(source, any_dtype=dtype is not None)
    quantised = dtype == "fp8"
    target = HuggingFaceTarget(
        source,
        torch.bfloat16 if quantised else _dtype(dtype),
        config.scale_format if quantised else None,
        config.max_shard_bytes,
    )
    return _convert(config, source, target, {CARD: card_text(_verb(config), config, source.folder, target.config())})


def card_text(verb: str, config: HuggingFaceConfig | QuantizeConfig, source: Path, hf: HFConfig) -> str:
    """The model card of a conversion's result.

    Args:
        verb: what makes it.
        config: of the conversion.
        source: where tokenizer, generation settings and perhaps another card stand.
        hf: `config.json` of the result.

    Raises:
        DataError: a lineage or results that cannot be read.
    """
    section = CardConfig(**{name: getattr(config, name) for name in CardConfig.model_fields})
    lineage = config.lineage or find_lineage(config.source)
    named = section.model_copy(update={"name": config.name or config.output.resolve().name, "lineage": lineage})
    return card(hf, source, named, Conversion(verb, config.source.resolve().name, __version__))


def _convert(
    config: ConvertConfig, source: Source, target: Target, texts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert, or say what a conversion would take.

    Args:
        config: of the conversion.
        source: what is read.
        target: what is written.
        texts: files that stand beside the weights.

    Raises:
        ConfigError: no room on the disk, or another process is converting to the same output.
        DataError: the source is damaged, or the output cannot be written.
        OSError: the disk is full after all.
    """
    output, verb = _output(config), _verb(config)
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
        if _identity(config, source) != space.identity:
            raise DataError(f"{config.source} has changed while it was read; run the command again")
        figures |= {"seconds": round(time.monotonic() - begin, 3), "peak_memory": peak_memory()}
        lineage = {"verb": verb, **space.identity, "source": config.source.resolve().name}  # strangers read it
        named = {LINEAGE: lineage} | ({SUMMARY: figures} if not config.folder else {})
        documents = {name: json.dumps(value, indent=2) + "\n" for name, value in named.items()}
        space.publish(target, plan.parts, {**(texts or {}), **documents})
    print(ending(config, figures))
    return write_summary(config.output, figures)


def ending(config: ConvertConfig, figures: dict[str, Any]) -> str:
    """What was done, and the command that proves it."""
    size, memory = gigabytes(figures["bytes_written"]), gigabytes(figures["peak_memory"])
    took = f"{duration(figures['seconds'])}, at most {memory} of memory"
    command = ["megatron-r1", "verify", str(config.source), str(_output(config))]
    command += [f"--config={folder}"] if (folder := getattr(config, "config", None)) else []
    command += [] if config.mtp else ["--no-mtp"]
    command += ["--tolerance=0.04"] if getattr(config, "dtype", None) == "fp8" else []
    lines = [
        f"wrote {figures['output']}: {figures['tensors_written']:,} tensors, {size} in {took}",
        f"compare the two: {shlex.join(command)}",
    ]
    return "\n".join(lines)


def describe(verb: str, config: ConvertConfig, figures: dict[str, Any]) -> str:
    """The text of `--dry-run`."""
    memory, largest, needed, free = (gigabytes(figures[key]) for key in ("memory", "largest_tensor", "needed", "free"))
    written = f"{figures['tensors_written']:,} tensors, {figures['bytes_written']:,} bytes"
    parts = counted(figures["parts"], "part")
    seconds = figures["seconds"]
    time_needed = f"about {duration(seconds)}" if seconds >= 1 else "less than a second"
    lines = [
        f"{verb} {config.source} -> {_output(config)}: {figures['architecture']}, nothing is written now",
        f"  reads    {figures['tensors_read']:,} tensors, {figures['bytes_read']:,} bytes",
        f"  writes   {written} in {parts}",
        f"  memory   {memory} at most with {counted(config.workers, 'worker')}; the largest tensor has {largest}",
        f"  disk     {needed} needed, {free} free" + (": not enough" if figures["needed"] > figures["free"] else ""),
        f"  time     {time_needed}, if the disk reads as fast as it writes",
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
    files = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in source.files]
    digest = hashlib.sha256(json.dumps([files, source.hf], sort_keys=True).encode()).hexdigest()
    other = {"source", "output", "folder", "workers", "dry_run", *CardConfig.model_fields}
    options = config.model_dump(mode="json", exclude=other)
    return {
        "megatron_r1": __version__,
        "source": str(config.source.resolve()),
        "source_digest": digest,
        "options": options,
    }


def _verb(config: ConvertConfig) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _output(config: ConvertConfig | QuantizeConfig) -> Path:
    return config.output / config.folder


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None
