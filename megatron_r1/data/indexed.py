"""`megatron-r1 data index`: documents to the Megatron indexed datasets that pretraining reads.

::

    inputs -> pieces -> [workers: text -> tokens -> split] -> parts -> <output>/<name>[/<split>].bin, .idx

The order of the documents is that of the inputs, so the files are the same bytes whatever the number of workers. Parts
are kept until all is written: a killed run, started again, makes only those that are missing.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy

from megatron_r1.compat import megatron_cpu
from megatron_r1.config.corpus import IndexConfig
from megatron_r1.data.files import aside, write_json
from megatron_r1.data.index_workers import write_parts
from megatron_r1.data.parts import Part, Writer
from megatron_r1.data.pieces import cut
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

megatron_cpu.enable()
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # noqa: E402

_PARTS = ".parts"
"""Folder of what the workers have finished, below the output; hidden, for it is no result."""
_UNCUT = {"all": 1.0}
_BLOCK = 4 << 20
"""Bytes copied at once."""


def build(config: IndexConfig) -> dict[str, Any]:
    """Tokenize every input and write `<output>/<name>.bin` and `.idx`, or one of each for every split of it.

    Returns:
        Documents, tokens and longest document of each dataset, by its path below the output.

    Raises:
        DataError: the tokenizer does not load; an input is missing, empty, or has a line without a text.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    inputs = cut({name: paths if isinstance(paths, list) else [paths] for name, paths in config.inputs.items()})
    parts = config.output / _PARTS
    parts.mkdir(parents=True, exist_ok=True)
    writer = Writer(parts, tokenizer, config.text_key, dtype, config.split or _UNCUT)
    write_parts(writer, [piece for pieces in inputs.values() for piece in pieces], config.workers or _cores())
    splits = {}
    for name, pieces in inputs.items():
        written = [writer.part(piece) for piece in pieces]
        for split in config.split or _UNCUT:
            dataset = f"{name}/{split}" if config.split else name
            splits[dataset] = _join(written, split, config.output / dataset, dtype)
    summary = {"vocab_size": tokenizer.vocab_size, "splits": splits}
    write_json(config.output / "summary.json", summary)
    shutil.rmtree(parts)
    return summary


def _join(parts: list[Part], split: str, path: Path, dtype: type[Any]) -> dict[str, int]:
    """The same split of all parts, in order, as one indexed dataset."""
    lengths = numpy.concatenate([part.lengths(split) for part in parts])
    if not len(lengths):
        raise DataError(f"no document falls into {path}: its share is too small for so few documents")
    with aside(path.with_name(path.name + ".idx")) as idx, aside(path.with_name(path.name + ".bin")) as data:
        builder = IndexedDatasetBuilder(str(data), dtype=dtype)
        try:
            for part in parts:  # what `add_index` does, without an index for each part
                with part.tokens(split).open("rb") as tokens:
                    shutil.copyfileobj(tokens, builder.data_file, _BLOCK)
            builder.sequence_lengths = lengths.tolist()
            builder.document_indices = list(range(len(lengths) + 1))
        finally:
            # Closes the data file as well, on an error too.
            builder.finalize(str(idx))
    return {"documents": len(lengths), "tokens": int(lengths.sum(dtype=numpy.int64)), "longest": int(lengths.max())}


def _cores() -> int:
    return len(os.sched_getaffinity(0))
