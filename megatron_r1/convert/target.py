"""Where a conversion writes to: parts of a Hugging Face folder or of a Megatron checkpoint.

What stands in which part follows from the rules alone, so a conversion gives the same files whatever the number of
its workers, and goes on with the parts that it lacks.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_r1.checkpoint.source import RELEASE, TRACKER, Source, one_to_one
from megatron_r1.checkpoint.torch_dist import PartWriter, Record, finish, saved_nbytes
from megatron_r1.errors import DataError
from megatron_r1.model import fp8
from megatron_r1.model.family import HFConfig, Rule
from megatron_r1.model.hf_folder import QUANTIZATION, copy_companions, shard_names, write_index
from megatron_r1.model.safetensors_file import Spec, Writer
from megatron_r1.model.sharding import Place

Task = tuple[Rule, ...]
"""What one worker does at a stretch."""

TASK_BYTES = 2**28
PART_BYTES = 2**31
SMALL_PART_BYTES = 2**26
PARTS = 32
"""A Megatron checkpoint has at least so many parts where they are not smaller than `SMALL_PART_BYTES`, for workers to
share."""


@dataclass(frozen=True)
class Part:
    """One file of the result."""

    file: str
    """Below the output folder."""
    tasks: tuple[Task, ...]
    nbytes: int


class Sink(Protocol):
    """A part that is being written; it appears whole when it is closed."""

    def put(self, rule: Rule) -> None:
        """Write a rule's tensors as the source gives them."""
        ...

    def close(self) -> list[Record]:
        """Put the file in its place. Returns what `Target.finish` must know of it."""
        ...

    def abandon(self) -> None:
        """Remove what was written."""
        ...


class Target(Protocol):
    """A format."""

    def nbytes(self, rule: Rule) -> int:
        """Bytes that a rule's tensors take."""
        ...

    def count(self, rule: Rule) -> int:
        """How many tensors a rule makes."""
        ...

    def striped(self, rule: Rule) -> bool:
        """Whether it never holds a whole tensor of a rule if the source gives it in stripes."""
        ...

    def parts(self) -> list[Part]:
        """All files with tensors, in the order of the rules."""
        ...

    def open(self, folder: Path, part: Part) -> Sink:
        """Begin a part; its `put` is called from several threads if the part has several tasks."""
        ...

    def finish(self, folder: Path, records: Iterable[Record]) -> None:
        """Write all that is no tensor, once the parts are there."""
        ...


class HuggingFaceTarget:
    """A folder of safetensors.

    Args:
        source: what is converted.
        dtype: of all tensors but those that a family keeps in float32; None = as they are.
        scale_format: not None = FP8 for the linear layers.
        max_shard_bytes: size of a file, but for a rule whose tensors are larger.
    """

    def __init__(
        self, source: Source, dtype: torch.dtype | None, scale_format: fp8.ScaleFormat | None, max_shard_bytes: int
    ) -> None:
        self._source, self._dtype, self._scale_format = source, dtype, scale_format
        self._specs = {rule.megatron: self._rule_specs(rule) for rule in source.rules}
        shards = _grouped(source.rules, self.nbytes, max_shard_bytes)
        self._parts = [
            Part(name, tuple(map(tuple, _grouped(rules, self.nbytes, TASK_BYTES))), sum(map(self.nbytes, rules)))
            for name, rules in zip(shard_names(len(shards)), shards, strict=True)
        ]

    def nbytes(self, rule: Rule) -> int:
        """Copies and scales included."""
        return sum(spec.nbytes for spec in self._specs[rule.megatron].values())

    def count(self, rule: Rule) -> int:
        """Copies and scales included."""
        return len(self._specs[rule.megatron])

    def striped(self, rule: Rule) -> bool:
        """Always."""
        return True

    def parts(self) -> list[Part]:
        """The shards."""
        return self._parts

    def open(self, folder: Path, part: Part) -> Sink:
        """Begin a shard."""
        return _Shard(folder / part.file, self.specs(part), self._source, self._scale_format)

    def finish(self, folder: Path, records: Iterable[Record]) -> None:
        """Index, `config.json`, tokenizer."""
        if len(self._parts) > 1:
            files = {name: part.file for part in self._parts for name in self.specs(part)}
            write_index(folder, files, sum(part.nbytes for part in self._parts))
        write_config(folder, self.config())
        copy_companions(folder, [self._source.folder])

    def config(self) -> HFConfig:
        """`config.json`."""
        dtype = self._dtype or common_dtype(self._source)
        config = corrected_config(self._source.hf, dtype)
        if not self._scale_format:
            return config
        return config | {QUANTIZATION: fp8.quantization_config(self._scale_format, self._kept())}

    def _kept(self) -> list[str]:
        """Linear layers that are not in FP8; DeepSeek's own configs leave them out, since its code knows them."""
        if self._source.hf.get("model_type") == "deepseek_v3":
            return []
        matrices = [name for rule in self._source.rules for name in rule.hf if len(self._source.spec(name).shape) == 2]
        others = [name.removesuffix(".weight") for name in matrices if not fp8.is_quantized(name)]
        return [name for name in others if not name.endswith("embed_tokens")]

    def _rule_specs(self, rule: Rule) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        for name in rule.hf:
            spec = Spec(output_dtype(rule, self._source, self._dtype), self._source.spec(name).shape)
            if self._scale_format and fp8.is_quantized(name):
                specs |= fp8.stored(name, spec.shape)
            else:
                specs[name] = spec
        return specs | dict.fromkeys(rule.copies, specs[rule.hf[0]])

    def specs(self, part: Part) -> dict[str, Spec]:
        """The tensors of a shard by their names."""
        rules = [rule for task in part.tasks for rule in task]
        return {name: spec for rule in rules for name, spec in self._specs[rule.megatron].items()}


class _Shard:
    """A safetensors file, written beside its place."""

    def __init__(
        self, path: Path, specs: dict[str, Spec], source: Source, scale_format: fp8.ScaleFormat | None
    ) -> None:
        self._path, self._specs, self._source, self._scale_format = path, specs, source, scale_format
        self._writer, self._closed = Writer(path.with_name(f"{path.name}.partial"), specs), False

    def put(self, rule: Rule) -> None:
        for name, stripes in zip(rule.hf, self._source.stripes(rule), strict=True):
            row = 0
            for stripe in stripes:
                self._put(rule, name, stripe, row)
                row += len(stripe)

    def _put(self, rule: Rule, name: str, rows: torch.Tensor, row: int) -> None:
        dtype = self._specs[name].dtype
        if dtype is torch.float8_e4m3fn and self._scale_format:
            # In bfloat16, which is what FP8 dequantises to: a block made of finer numbers would not come back.
            rows = rows.to(torch.bfloat16)
            weight, scale = fp8.quantize(rows, scale_format=self._scale_format, name=name, row=row)
            self._writer.put_rows(name, weight)
            self._writer.put_rows(name + fp8.SCALE_SUFFIX, scale)
            return
        value = rounded(name, rows, dtype)
        for stored in (name, *rule.copies):
            self._writer.put_rows(stored, value)

    def close(self) -> list[Record]:
        self._closed = True
        with self._writer:  # closes it, or removes the file
            pass
        os.replace(self._writer.path, self._path)
        return []

    def abandon(self) -> None:
        if not self._closed:
            self._writer.abort()


class MegatronTarget:
    """A folder that Megatron-LM's `--load` takes: `release/` in the format torch_dist, and the file that names it.

    Args:
        source: what is converted.
        dtype: of all tensors but those that a family keeps in float32; None = as they are.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None) -> None:
        torch.serialization.set_crc32_options(False)  # as PartWriter does; sizes are then known without the numbers
        self._source, self._dtype, self._places = source, dtype, source.places.places
        total = sum(map(self.nbytes, source.rules))
        size = min(max(total // PARTS, SMALL_PART_BYTES), PART_BYTES)
        self._parts = [
            Part(f"{RELEASE}/__{index}_0.distcp", (tuple(rules),), sum(map(self.nbytes, rules)))
            for index, rules in enumerate(_grouped(source.rules, self.nbytes, size))
        ]

    def nbytes(self, rule: Rule) -> int:
        """What stands around each piece in the file included."""
        dtype = output_dtype(rule, self._source, self._dtype)
        return sum(saved_nbytes(Spec(dtype, piece.shape)) for piece in self._places[rule.megatron].pieces)

    def count(self, rule: Rule) -> int:
        """Pieces: two for a gated MLP's first matrix."""
        return len(self._places[rule.megatron].pieces)

    def striped(self, rule: Rule) -> bool:
        """Where Megatron's tensor is not to be joined of several."""
        return one_to_one(rule, self._places[rule.megatron])

    def parts(self) -> list[Part]:
        """Files of about `PART_BYTES`."""
        return self._parts

    def open(self, folder: Path, part: Part) -> Sink:
        """Begin a file."""
        path = folder / part.file
        path.parent.mkdir(exist_ok=True)
        return _Part(path, self._source, self._dtype)

    def finish(self, folder: Path, records: Iterable[Record]) -> None:
        """Metadata, `config.json`, tokenizer, tracker."""
        common = {"checkpoint_version": 3.0, "iteration": 0}
        finish(folder / RELEASE, records, self._source.places.objects, common)
        write_config(folder, corrected_config(self._source.hf, self._dtype or common_dtype(self._source)))
        copy_companions(folder, [self._source.folder])
        (folder / TRACKER).write_text(f"{RELEASE}\n")


class _Part:
    """A `.distcp` file."""

    def __init__(self, path: Path, source: Source, dtype: torch.dtype | None) -> None:
        self._source, self._dtype = source, dtype
        self._writer = PartWriter(path)

    def put(self, rule: Rule) -> None:
        place = self._source.places.places[rule.megatron]
        dtype = output_dtype(rule, self._source, self._dtype)
        for piece, stripes in zip(place.pieces, self._stripes(rule, place), strict=True):
            self._writer.put_rows(piece, dtype, (rounded(rule.megatron, stripe, dtype) for stripe in stripes))

    def _stripes(self, rule: Rule, place: Place) -> Sequence[Iterable[torch.Tensor]]:
        """The numbers of each piece, in blocks."""
        if one_to_one(rule, place):
            return self._source.stripes(rule)
        whole = rule.join(self._source.read(rule))
        width = whole[0].numel()
        return [[block] for block in whole.split([math.prod(piece.shape) // width for piece in place.pieces])]

    def close(self) -> list[Record]:
        return self._writer.close()

    def abandon(self) -> None:
        self._writer.abandon()


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in another dtype.

    Raises:
        DataError: a number is too large for float16, whose largest is 65,504.
    """
    value = tensor.to(dtype)
    if dtype is torch.float16 and value.isinf().any() and not tensor.isinf().any():
        raise DataError(f"{name} holds {float(tensor.abs().max()):g}, too large for float16; bfloat16 holds it")
    return value


def output_dtype(rule: Rule, source: Source, dtype: torch.dtype | None) -> torch.dtype:
    """Of a rule's tensors in the result."""
    return torch.float32 if rule.float32 else dtype or source.spec(rule.hf[0]).dtype


def common_dtype(source: Source) -> torch.dtype:
    """Of the tensors that no family keeps in float32."""
    return next(source.spec(rule.hf[0]).dtype for rule in source.rules if not rule.float32)


def corrected_config(hf: HFConfig, dtype: torch.dtype) -> HFConfig:
    """`config.json` for weights in `dtype`, under the key that it has for it (transformers 5 renamed it).

    Without `auto_map`: it names Python files that stood beside the weights, which are not copied.
    """
    key = "dtype" if "dtype" in hf else "torch_dtype"
    kept = {name: value for name, value in hf.items() if name not in {QUANTIZATION, "auto_map"}}
    return kept | {key: str(dtype).split(".")[1]}


def write_config(folder: Path, config: HFConfig) -> None:
    """Write `config.json`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _grouped(rules: Sequence[Rule], nbytes: Any, limit: int) -> list[list[Rule]]:
    """Consecutive rules, as many together as fit into `limit` bytes."""
    groups: list[list[Rule]] = []
    held = 0
    for rule in rules:
        size = nbytes(rule)
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(rule)
        held += size
    return groups
