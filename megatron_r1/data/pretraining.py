"""Megatron indexed datasets -> rows of a fixed length, by number.

Which row is fed at which step depends on nothing but the seed, the step and how many rows the whole run
takes, so a resumed run needs no cursor: it asks for the next rows. (Megatron shuffles all epochs of a run
together: with another number of steps the order is another.)
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.compat import megatron_cpu
from megatron_r1.config.corpus import WeightedDataset
from megatron_r1.data.fim import Fim, FimDocuments
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

megatron_cpu.enable()
from megatron.core.datasets.blended_dataset import BlendedDataset  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402

_WHOLE = "whole"
"""File in a cache folder that says that the index in it is complete, and of what."""


@dataclass
class Rows:
    """Rows of a corpus."""

    tokens: torch.Tensor
    """[rows, seq]"""
    labels: torch.Tensor
    """The token after each. [rows, seq]"""


class Corpus:
    """Documents concatenated and cut into rows, shuffled by Megatron's GPTDataset, blended by its BlendedDataset.

    Documents are packed without a cross-document attention mask (DeepSeek-V3, arXiv 2412.19437, 4.1).

    Args:
        datasets: indexed datasets without the .bin/.idx ending; those without a weight count by their tokens.
        tokenizer: the one that made them.
        sequence_length: tokens of a row.
        rows: how many rows will be asked for; documents repeat when there are fewer.
        cache: folder for Megatron's shuffling index, of this corpus alone.
        seed: of the shuffle.
        fim_rate: share of the documents that are rearranged for filling in the middle.

    Raises:
        DataError: a dataset is missing, damaged, or holds less than one row.
        ConfigError: the tokenizer has no tokens for filling in the middle.
    """

    def __init__(
        self,
        datasets: Sequence[Path | WeightedDataset],
        tokenizer: Tokenizer,
        sequence_length: int,
        rows: int,
        cache: Path,
        seed: int,
        fim_rate: float = 0.0,
    ) -> None:
        paths = [part if isinstance(part, Path) else part.path for part in datasets]
        for path in paths:
            if not path.with_name(path.name + ".idx").exists():
                raise DataError(f"no indexed dataset {path}.idx; `megatron-r1 data index` writes one")
        settings = {
            "random_seed": seed,
            "sequence_length": sequence_length,
            "path_to_cache": str(cache),
            "tokenizer": _SpecialTokens(tokenizer),
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
            "fim": Fim.of(tokenizer, fim_rate, seed) if fim_rate else None,
        }
        weights = [None if isinstance(part, Path) else part.weight for part in datasets]
        facts = {"rows": rows, "length": sequence_length, "seed": seed, "weights": weights, "fim": fim_rate}
        identity = json.dumps({**facts, "data": _fingerprint(paths)})
        _drop_unless_whole(cache, identity)
        names = ", ".join(map(str, paths))
        try:
            shares = [_tokens(path) if weight is None else weight for path, weight in zip(paths, weights, strict=True)]
            self._dataset = _blend(paths, shares, rows, settings)
        except (ValueError, OSError, AssertionError) as error:
            raise DataError(
                f"cannot read the indexed dataset {names}: {error}; write it again by `data index`"
            ) from error
        if self._dataset is None or len(self._dataset) < rows:
            raise DataError(f"{names}: too few tokens for one row of {sequence_length}")
        (cache / _WHOLE).write_text(identity)

    def rows(self, start: int, count: int, device: torch.device) -> Rows:
        """Rows `start` to `start + count - 1`."""
        rows = [self._dataset[index] for index in range(start, start + count)]
        tokens, labels = (torch.stack([row[key] for row in rows]).to(device) for key in ("tokens", "labels"))
        return Rows(tokens, labels)


@dataclass
class _Config(GPTDatasetConfig):
    """Megatron's settings and ours."""

    fim: Fim | None = None


class _Dataset(GPTDataset):
    """Rows of one indexed dataset, its documents rearranged where that is asked for."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: _Config) -> Any:
        documents = GPTDataset.build_low_level_dataset(dataset_path, config)
        return FimDocuments(documents, config.fim) if config.fim else documents


def _blend(paths: list[Path], weights: list[float], rows: int, settings: dict[str, Any]) -> Any:
    """A dataset of `rows` rows, of which each of `paths` gives its share, evenly spread."""
    if len(paths) == 1:
        return _member(paths[0], rows, settings)
    # Before it takes a row, the dataset that gets it lags behind its share, so none gives more than one row more.
    sizes = [int(rows * weight / sum(weights)) + 1 for weight in weights]
    members = [_member(path, size, settings) for path, size in zip(paths, sizes, strict=True)]
    config = members[0].config
    if not dist.is_initialized():  # Megatron's cache asks for its rank
        config = replace(config, path_to_cache=None)
    return BlendedMegatronDatasetBuilder.build_generic_dataset(
        BlendedDataset, lambda: True, True, members, weights, rows, config
    )


def _member(path: Path, rows: int, settings: dict[str, Any]) -> Any:
    config = _Config(**settings, blend_per_split=[([str(path)], None), None, None])
    return BlendedMegatronDatasetBuilder(_Dataset, [rows, None, None], lambda: True, config).build()[0]


def _tokens(path: Path) -> float:
    """The size of a dataset, in units that are the same for all that one tokenizer has made."""
    return float(path.with_name(path.name + ".bin").stat().st_size)


def _drop_unless_whole(cache: Path, identity: str) -> None:
    """Megatron takes an index as valid that a killed run left half-written, or that is of data since written anew."""
    first = not dist.is_initialized() or dist.get_rank() == 0  # The others read only what the first has built.
    if first and not ((cache / _WHOLE).exists() and (cache / _WHOLE).read_text() == identity):
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)


def _fingerprint(paths: list[Path]) -> list[list[int]]:
    files = [path.with_name(path.name + ending) for path in paths for ending in (".idx", ".bin")]
    return [[file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


class _SpecialTokens:
    """The three facts that GPTDataset asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {"path": str(tokenizer.path), "vocab_size": tokenizer.vocab_size}
