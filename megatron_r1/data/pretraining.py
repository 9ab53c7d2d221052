"""Megatron indexed datasets -> rows of a fixed length, by number.

Which row is fed at which step depends on nothing but the seed, the step and how many rows the whole run
takes, so a resumed run needs no cursor: it asks for the next rows. (Megatron shuffles all epochs of a run
together: with another number of steps the order is another.)
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.compat import megatron_cpu
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

megatron_cpu.enable()
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
    """Documents concatenated and cut into rows, blended and shuffled by Megatron's GPTDataset.

    Documents are packed without a cross-document attention mask (DeepSeek-V3, arXiv 2412.19437, 4.1).

    Args:
        paths: indexed datasets without the .bin/.idx ending, weighted by their size.
        tokenizer: the one that made them.
        sequence_length: tokens of a row.
        rows: how many rows will be asked for; documents repeat when there are fewer.
        cache: folder for Megatron's shuffling index, of this corpus alone.
        seed: of the shuffle.

    Raises:
        DataError: a dataset is missing, damaged, or holds less than one row.
    """

    def __init__(
        self, paths: list[Path], tokenizer: Tokenizer, sequence_length: int, rows: int, cache: Path, seed: int
    ) -> None:
        for path in paths:
            if not path.with_name(path.name + ".idx").exists():
                raise DataError(f"no indexed dataset {path}.idx; `megatron-r1 data index` writes one")
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend_per_split=[([str(path) for path in paths], None), None, None],
            path_to_cache=str(cache),
            tokenizer=_SpecialTokens(tokenizer),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        names = ", ".join(map(str, paths))
        identity = json.dumps({"rows": rows, "length": sequence_length, "seed": seed, "data": _fingerprint(paths)})
        _drop_unless_whole(cache, identity)
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [rows, None, None], lambda: True, config)
        try:
            self._dataset = builder.build()[0]
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
