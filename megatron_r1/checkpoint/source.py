"""Where a conversion reads from: a checkpoint of any kind as the Hugging Face tensors of its family's rules.

FP8 weights appear dequantised. Nothing is read but headers until a rule's tensors are asked for.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.torch_dist import EMBEDDING, TorchDistReader, is_torch_dist
from megatron_r1.errors import DataError
from megatron_r1.model.build import rules
from megatron_r1.model.family import HFConfig, Rule
from megatron_r1.model.fp8 import BLOCK, SCALE_SUFFIX
from megatron_r1.model.hf_folder import TensorReader, read_config
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.model.sharding import Layout, Piece, Place, layout
from megatron_r1.wording import counted

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's file that names the checkpoint of a folder to load."""
RELEASE = "release"
"""What that file says of weights that no training run has numbered."""
_MTP, _MTP_KEYS = "num_nextn_predict_layers", "mtp."
_SHOWN = 5


class Source(Protocol):
    """A checkpoint that is converted, inspected or compared."""

    hf: HFConfig
    """Its `config.json`, without the MTP layers where these are left out."""
    rules: list[Rule]
    """Every tensor of the model, in order."""
    folder: Path
    """Where tokenizer and generation settings stand."""
    files: list[Path]
    """All that it is read from."""
    places: Layout
    """The shapes that `config.json` gives the model's tensors."""

    def __contains__(self, name: str) -> bool:
        """Whether it holds the Hugging Face tensor `name`, in whatever form."""
        ...

    def unknown(self) -> list[str]:
        """What it holds and no rule knows."""
        ...

    def spec(self, name: str) -> Spec:
        """Shape, and dtype as `read` gives it, of one of a rule's `hf`."""
        ...

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The tensors `rule.hf`; from any thread.

        Raises:
            DataError: damaged; not a number where a scale is due; a second copy of the tensor differs.
        """
        ...

    def stripes(self, rule: Rule) -> list[Iterable[torch.Tensor]]:
        """The same, each tensor in consecutive blocks of its rows, which begin at multiples of 128.

        Raises:
            DataError: as `read`, at any of the blocks.
        """
        return [[tensor] for tensor in self.read(rule)]

    def striped(self, rule: Rule) -> bool:
        """Whether `stripes` never holds a whole tensor."""
        return False

    def stored(self, rule: Rule) -> list[Spec]:
        """Every tensor that a rule uses, as it is stored: scales and copies too."""
        ...


class HuggingFaceSource(Source):
    """A folder of safetensors.

    Args:
        folder: with `config.json`.
        mtp: False = without the MTP layers, whether their tensors are there or not.
    """

    def __init__(self, folder: Path, mtp: bool = True) -> None:
        whole = read_config(folder)
        self.folder, self.hf = folder, whole if mtp else without_mtp(whole)
        self.rules, self.places = rules(self.hf), layout(self.hf)
        self._reader = TensorReader(folder)
        self._known = {name for rule in rules(whole) for name in _names(rule)}
        self.files = [folder / "config.json", *sorted({entry.path for entry in self._reader.stored.values()})]

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def unknown(self) -> list[str]:
        """Names that no rule knows; what belongs to an MTP layer that is left out is known."""
        return [name for name in self._reader if name not in self._known]

    def spec(self, name: str) -> Spec:
        """From headers; bfloat16 for an FP8 weight."""
        return self._reader.spec(name)

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The tensors of a rule, its copies compared."""
        return [_whole(self.spec(name), blocks) for name, blocks in zip(rule.hf, self.stripes(rule), strict=True)]

    def stripes(self, rule: Rule) -> list[Iterable[torch.Tensor]]:
        """The tensors of a rule in blocks of rows, its copies compared."""
        first, *others = (self._reader.stripes(name) for name in rule.hf)
        return [self._compared(rule, first), *others]

    def stored(self, rule: Rule) -> list[Spec]:
        """Every tensor that a rule uses, as it is stored."""
        names = [name for name in _names(rule) if name in self._reader]
        entries = [self._reader.stored[name] for name in names]
        entries += [entry for name in names if (entry := self._reader.stored.get(name + SCALE_SUFFIX))]
        return [Spec(entry.dtype, entry.shape) for entry in entries]

    def striped(self, rule: Rule) -> bool:
        """Always."""
        return True

    def _compared(self, rule: Rule, stripes: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The first tensor of a rule, bit for bit what stands under every other name that it has."""
        names = [name for name in (*rule.copies, *rule.redundant) if name in self._reader]
        copies = {name: self._reader.stripes(name) for name in names}
        same_kind = {name: self.spec(name) == self.spec(rule.hf[0]) for name in names}
        for stripe in stripes:
            for name, copy in copies.items():
                if not same_kind[name] or not _equal(next(copy), stripe):
                    raise DataError(
                        f"{self.folder}: {name} differs from {rule.hf[0]}, but config.json says that they are one"
                        + (": set tie_word_embeddings = false there if they are two" if rule.redundant else "")
                    )
            yield stripe


class MegatronSource(Source):
    """A `torch_dist` directory, ours or megatron-core's, seen through a `config.json`.

    Args:
        checkpoint: holds `.metadata`.
        folder: with `config.json` and the tokenizer.
        mtp: False = without the MTP layers, whether their tensors are there or not. A checkpoint that has none of
            them, as a policy's, is read so in any case.
    """

    def __init__(self, checkpoint: Path, folder: Path, mtp: bool = True) -> None:
        whole = read_config(folder)
        self._reader = TorchDistReader(checkpoint)
        self.lacks_mtp = (
            mtp and bool(whole.get(_MTP)) and not any(key.startswith(_MTP_KEYS) for key in self._reader.keys)
        )
        """Whether the MTP layers that `config.json` names are left out because none is there."""
        mtp = mtp and not self.lacks_mtp
        self.folder, self.hf = folder, whole if mtp else without_mtp(whole)
        self.rules, self.places = rules(self.hf), layout(self.hf, self._reader.style)
        self._by_name = {name: rule for rule in self.rules for name in rule.hf}
        self._known = {piece.key for place in self.places.places.values() for piece in place.pieces}
        self._left_out = () if mtp else (_MTP_KEYS,)
        self.files = [folder / "config.json", *sorted(path for path in checkpoint.iterdir() if path.is_file())]

    def __contains__(self, name: str) -> bool:
        rule = self._by_name.get(name)
        return rule is not None and all(piece.key in self._reader.keys for piece in self._place(rule).pieces)

    def unknown(self) -> list[str]:
        """Keys that no tensor of the model has."""
        return [key for key in self._reader.keys if key not in self._known and not key.startswith(self._left_out)]

    def spec(self, name: str) -> Spec:
        """From the checkpoint's metadata.

        Raises:
            DataError: the checkpoint's tensor has another shape than `config.json` gives it.
        """
        rule = self._by_name[name]
        place = self._place(rule)
        stored = [self._reader.spec(piece) for piece in place.pieces]
        return Spec(stored[0].dtype, hf_shapes(rule, place)[rule.hf.index(name)])

    def padding(self) -> int:
        """Rows behind the vocabulary's own that `read` leaves out."""
        (rows,) = self.places.places[EMBEDDING].pieces
        return self._reader.spec(rows).shape[0] - rows.global_shape[0]

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The tensors of a rule, cut out of Megatron's."""
        place = self._place(rule)
        blocks = [self._reader.read(piece).reshape(-1, *place.shape[1:]) for piece in place.pieces]
        if rule.groups == 1 and [tuple(block.shape) for block in blocks] == hf_shapes(rule, place):
            return blocks
        return rule.cut(torch.cat(blocks) if len(blocks) > 1 else blocks[0])

    def stripes(self, rule: Rule) -> list[Iterable[torch.Tensor]]:
        """The tensors of a rule in blocks of rows, where Megatron's are not to be cut."""
        place = self._place(rule)
        if not self.striped(rule):
            return super().stripes(rule)
        shapes = hf_shapes(rule, place)
        return [self._stripes(piece, shape) for piece, shape in zip(place.pieces, shapes, strict=True)]

    def striped(self, rule: Rule) -> bool:
        """Where each of Megatron's pieces is one of the tensors."""
        return one_to_one(rule, self._place(rule))

    def _stripes(self, piece: Piece, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        axis = len(piece.shape) - len(shape)
        before, after = piece.shape[:axis], piece.shape[axis + 1 :]
        chunks = self._reader.holding(piece)
        for start, stop in Spec(self._reader.keys[piece.key].dtype, shape).stripes(BLOCK[0]):
            offset = (*piece.offset[:axis], piece.offset[axis] + start, *piece.offset[axis + 1 :])
            rows = replace(piece, offset=offset, shape=(*before, stop - start, *after))
            yield self._reader.read(rows, chunks).reshape(stop - start, *shape[1:])

    def stored(self, rule: Rule) -> list[Spec]:
        """The pieces of a rule's tensor."""
        return [Spec(self._reader.keys[piece.key].dtype, piece.shape) for piece in self._place(rule).pieces]

    def _place(self, rule: Rule) -> Place:
        return self.places.places[rule.megatron]


class SourceWeights:
    """A source by the names of its tensors, as `build_model` reads the weights of a model."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rules = {name: rule for rule in source.rules for name in rule.hf}
        self._last: tuple[Rule, list[torch.Tensor]] | None = None

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._rules if name in self._source)

    def __contains__(self, name: object) -> bool:
        return name in self._rules and name in self._source

    def __getitem__(self, name: str) -> torch.Tensor:
        rule = self._rules[name]
        if self._last is None or self._last[0] is not rule:
            self._last = rule, self._source.read(rule)
        return self._last[1][rule.hf.index(name)]


def weights(path: Path) -> SourceWeights | None:
    """Of a Megatron checkpoint; None for a Hugging Face folder, which `build_model` reads itself. All ranks call it.

    Raises:
        DataError: the checkpoint is damaged or cannot be read, or holds a tensor that `config.json` has no place for.
    """
    if not path.is_dir() or not megatron_checkpoint(path):
        return None
    manifest.refuse_damaged(path, together=True)
    source = open_source(path)
    if unknown := source.unknown():
        raise DataError(
            f"{path} holds {counted(len(unknown), 'tensor')} that its config.json has no place for: {unknown[0]}, ..."
        )
    return SourceWeights(source)


def open_source(path: Path, config: Path | None = None, mtp: bool = True) -> Source:
    """A checkpoint by its path.

    Args:
        path: a Hugging Face folder; a Megatron checkpoint (of training too: `step_XXXXXXXX`), or a folder whose
            `latest_checkpointed_iteration.txt` names one; a `.gguf` file.
        config: a Hugging Face folder whose `config.json` and tokenizer belong to a Megatron checkpoint; None = the
            checkpoint's own, or those of the folder above it, or of `hf` of the training run that wrote it.
        mtp: False = without the multi-token-prediction layers.

    Raises:
        DataError: nothing that can be read, an architecture that is not supported, or a header that is damaged.
    """
    if path.suffix == ".gguf":
        from megatron_r1.checkpoint.gguf import GgufSource  # which builds on this module

        return GgufSource(path)
    if not path.is_dir():
        raise not_a_folder(path)
    checkpoint = megatron_checkpoint(path)
    if checkpoint is None:
        check_config(path)
        return HuggingFaceSource(path, mtp)
    of_the_run = path.absolute().parents[1] / "hf" if len(path.absolute().parents) > 1 else path
    described = [config] if config else [path, checkpoint.parent, of_the_run]
    folder = next((folder for folder in described if (folder / "config.json").exists()), None)
    if folder is None:
        raise DataError(
            f"{described[0]} has no config.json: a Megatron checkpoint does not say what model it is; "
            "name a Hugging Face folder of the same model with --config="
        )
    return MegatronSource(checkpoint, folder, mtp)


def megatron_checkpoint(path: Path) -> Path | None:
    """The Megatron checkpoint that a folder is, or names as its latest; None if it is something else.

    Raises:
        DataError: the one that it names is not there.
    """
    if is_torch_dist(path):
        return path
    tracker = path / TRACKER
    if not tracker.exists():
        return None
    latest = tracker.read_text().strip()
    if latest != RELEASE and not latest.isdecimal():
        raise DataError(f"{tracker} says {latest!r}: neither a number of steps nor {RELEASE!r}")
    folder = path / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
    if not is_torch_dist(folder):
        raise DataError(f"{tracker} names {latest}, but {folder} is not a Megatron checkpoint of format torch_dist")
    return folder


def not_a_folder(path: Path) -> DataError:
    """What to say of a path that should be a checkpoint's folder."""
    if not path.exists():
        return DataError(f"{path} does not exist")
    return DataError(f"{path} is neither a folder nor a .gguf file; name the folder that the checkpoint's files are in")


def check_config(folder: Path) -> None:
    """That a folder could be a Hugging Face model's.

    Raises:
        DataError: it has no `config.json`; the checkpoints below it are named.
    """
    if (folder / "config.json").exists():
        return
    below = [path for path in sorted((*folder.glob("*/"), *folder.glob("*/*/"))) if path.is_dir()]
    found = [str(path) for path in below if (path / "config.json").exists() or is_torch_dist(path)]
    hint = f"; below it are {', '.join(found[:_SHOWN])}" if found else ""
    raise DataError(
        f"{folder} has no config.json, as a Hugging Face folder has, and no .metadata, as a Megatron checkpoint "
        f"has{hint}"
    )


def hf_shapes(rule: Rule, place: Place) -> list[tuple[int, ...]]:
    """Shapes of `rule.hf`, from that of Megatron's tensor."""
    shares = rule.shares or (1,) * len(rule.hf)
    return [(place.shape[0] * share // sum(shares), *place.shape[1:]) for share in shares]


def one_to_one(rule: Rule, place: Place) -> bool:
    """Whether each piece of Megatron's tensor is one of the Hugging Face tensors."""
    sizes = [math.prod(shape) for shape in hf_shapes(rule, place)]
    return rule.groups == 1 and [math.prod(piece.shape) for piece in place.pieces] == sizes


def without_mtp(hf: HFConfig) -> HFConfig:
    """The `config.json` of the same model without multi-token prediction."""
    return {**hf, _MTP: 0} if hf.get(_MTP) else hf


def _whole(spec: Spec, blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """A tensor from its blocks of rows."""
    whole, done = torch.empty(spec.shape, dtype=spec.dtype), 0
    for block in blocks:
        whole.view(-1)[done : done + block.numel()] = block.view(-1)
        done += block.numel()
    return whole


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _names(rule: Rule) -> tuple[str, ...]:
    return (*rule.hf, *rule.copies, *rule.redundant)
