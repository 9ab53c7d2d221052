"""`data index` in a process of its own, with pieces so small that there is something to interrupt.

python index_program.py FOLDER TOKENIZER WORKERS: FOLDER/corpus.jsonl to FOLDER/index.
"""

import sys
from pathlib import Path

from megatron_r1.config.corpus import IndexConfig
from megatron_r1.data import pieces
from megatron_r1.data.indexed import build
from megatron_r1.errors import DataError

SMALLEST = 10_000


def config(folder: Path, tokenizer: Path, workers: int) -> IndexConfig:
    split = {"train": 0.9, "test": 0.1}
    inputs = {"web": folder / "corpus.jsonl"}
    return IndexConfig(inputs=inputs, output=folder / "index", tokenizer=tokenizer, split=split, workers=workers)


if __name__ == "__main__":
    pieces._SMALLEST = SMALLEST
    try:
        build(config(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
    except DataError as error:
        sys.exit(str(error))
