"""A checkpoint of true tensor names, shapes and dtypes: `python tools/header_checkpoint.py CONFIG_JSON OUTPUT`.

Its files have the size of the real ones but no data: they are sparse, and take the disk a few megabytes. So a
conversion of DeepSeek-V3 can be planned (`megatron-r1 import OUTPUT X --dry-run`) without its 689 GB. `--set` changes
keys of the config, `--fill` writes pseudo-random weights instead, which can be converted:

    python tools/header_checkpoint.py config.json two_layers --fill --set num_hidden_layers=2 n_routed_experts=32 ...

A config with a `quantization_config` gets FP8 weights in DeepSeek's blocks.
"""

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.checkpoint.source import Source, hf_shapes
from megatron_r1.convert.plan import standing
from megatron_r1.convert.target import HuggingFaceTarget, write_config
from megatron_r1.errors import UserError
from megatron_r1.model.build import rules
from megatron_r1.model.family import HFConfig, Rule
from megatron_r1.model.hf_folder import QUANTIZATION, write_index
from megatron_r1.model.safetensors_file import DTYPES, Spec
from megatron_r1.model.sharding import layout

SHARD_BYTES = 4_300_000_000
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 2**20


class Invented(Source):
    """A source of weights that nobody trained; the same for the same config.

    Args:
        hf: the `config.json`.
        folder: where it stands.
    """

    def __init__(self, hf: HFConfig, folder: Path) -> None:
        self.hf, self.folder, self.files = hf, folder, [folder / "config.json"]
        self.rules, self.places = rules(hf), layout(hf)
        self._shapes = {
            name: shape
            for rule in self.rules
            for name, shape in zip(rule.hf, hf_shapes(rule, self.places.places[rule.megatron]), strict=True)
        }
        self._float32 = {name for rule in self.rules if rule.float32 for name in rule.hf}
        self._block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def unknown(self) -> list[str]:
        return []

    def spec(self, name: str) -> Spec:
        return Spec(torch.float32 if name in self._float32 else torch.bfloat16, self._shapes[name])

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """One block of normal numbers, turned by the tensor's name and repeated."""
        return [self._fill(name) for name in rule.hf]

    def stored(self, rule: Rule) -> list[Spec]:
        return [self.spec(name) for name in rule.hf]

    def _fill(self, name: str) -> torch.Tensor:
        spec = self.spec(name)
        block = self._block.roll(sum(name.encode()) * 977).to(spec.dtype)
        size = torch.Size(spec.shape).numel()
        return block.repeat(-(-size // _BLOCK))[:size].view(spec.shape)


def write_headers(target: HuggingFaceTarget, folder: Path) -> None:
    """Files with headers and holes.

    Raises:
        OSError: the file system cannot make a file of that size.
    """
    for part in target.parts():
        header, end = {}, 0
        for name, spec in sorted(target.specs(part).items(), key=lambda item: -item[1].dtype.itemsize):
            begin, end = end, end + spec.nbytes
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (begin, end)}
        text = json.dumps(header, separators=(",", ":")).encode()
        with (folder / part.file).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)


def fill(target: HuggingFaceTarget, folder: Path) -> None:
    """Files with weights."""
    for part in target.parts():
        sink = target.open(folder, part)
        for rule in (rule for task in part.tasks for rule in task):
            sink.put(rule)
        sink.close()


def make(hf: HFConfig, output: Path, filled: bool) -> tuple[int, int]:
    """Write the checkpoint. Returns how many tensors it has, and their bytes."""
    output.mkdir(parents=True)
    write_config(output, hf)
    source = Invented(hf, output)
    target = HuggingFaceTarget(source, None, "float32" if QUANTIZATION in hf else None, SHARD_BYTES)
    fill(target, output) if filled else write_headers(target, output)
    files = {name: part.file for part in target.parts() for name in target.specs(part)}
    total = sum(part.nbytes for part in target.parts())
    if len(target.parts()) > 1:
        write_index(output, files, total)
    return len(files), total


def changed(hf: HFConfig, settings: Sequence[str]) -> HFConfig:
    """The config with `KEY=VALUE` settings, whose values are JSON."""
    pairs = (setting.split("=", 1) for setting in settings)
    return hf | {key: json.loads(value) for key, value in pairs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description="a checkpoint of true names, shapes and dtypes, without data")
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("output", type=Path, help="the folder that is made")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config to change")
    parser.add_argument("--fill", action="store_true", help="pseudo-random weights instead of holes")
    options = parser.parse_args(arguments)
    try:
        hf = changed(json.loads(options.config.read_text()), options.set)
        count, total = make(hf, options.output, options.fill)
    except UserError as error:
        print(f"header_checkpoint: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror
        if error.errno in {errno.EFBIG, errno.EINVAL, errno.ENOSPC} and not options.fill:
            reason = f"the file system of {standing(options.output)} has no sparse files of this size ({reason})"
        print(f"header_checkpoint: cannot write {error.filename or options.output}: {reason}", file=sys.stderr)
        return 1
    print(f"{options.output}: {count:,} tensors, {total:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
