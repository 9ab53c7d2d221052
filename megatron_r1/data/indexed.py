"""`megatron-r1 data index`: JSONL documents to the Megatron indexed datasets that pretraining reads."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
from rich.progress import Progress

from megatron_r1.compat import megatron_cpu
from megatron_r1.config.runs import IndexConfig
from megatron_r1.data.files import aside, documents, write_json
from megatron_r1.data.tokenizer import Tokenizer

megatron_cpu.enable()
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # noqa: E402

_BATCH = 1024
"""Documents tokenized at once."""


def build(config: IndexConfig) -> dict[str, Any]:
    """Tokenize every split and write `<output>/<split>.bin` and `.idx`.

    Returns:
        Documents, tokens and longest document of each split.

    Raises:
        DataError: the tokenizer does not load; an input is missing, empty, or has a line without `text`.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    summary: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "splits": {}}
    with Progress() as progress:
        for split, source in config.inputs.items():
            task = progress.add_task(f"{split} documents", total=None)
            lengths = []
            with aside(config.output / f"{split}.idx") as idx, aside(config.output / f"{split}.bin") as data:
                builder = IndexedDatasetBuilder(str(data), dtype=DType.optimal_dtype(tokenizer.vocab_size))
                try:
                    for ids in _encoded(source, tokenizer):
                        builder.add_document(ids, [len(ids)])
                        lengths.append(len(ids))
                        progress.advance(task)
                finally:
                    # Closes the data file as well, on an error too.
                    builder.finalize(str(idx))
            summary["splits"][split] = {"documents": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    write_json(config.output / "summary.json", summary)
    return summary


def _encoded(source: Path, tokenizer: Tokenizer) -> Iterator[numpy.ndarray[Any, Any]]:
    """Each document as [bos] + ids + [eos]."""
    texts = documents(source)
    while batch := list(islice(texts, _BATCH)):
        for ids in tokenizer.encode_documents(batch):
            yield numpy.asarray(ids)
