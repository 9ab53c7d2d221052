"""`data index` against the bare tokenizers that it is built on: the same documents, the same cores.

    python tools/bench/index.py [--megabytes=32] [--workers=2] [--rounds=5]

Documents are Python files of the standard library and of installed packages. Ours begins with a JSONL file and ends
with an indexed dataset on the disk: reading, parsing, starting workers and joining their parts included. The baseline
has the texts in memory, encodes them in batches with as many threads as ours has workers, and drops the ids.
"""

import argparse
import json
import os
import random
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from paired import Comparison, measure, report, seconds
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_r1.config.corpus import IndexConfig
from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data import tokenizer as tokenizers
from megatron_r1.data.indexed import build

VOCABULARY = 8000
TRAINED_ON = 300
"""Documents that the tokenizers are trained on."""
BATCH = 1024


def texts(megabytes: float) -> list[str]:
    """Python files, shuffled, until there are `megabytes` of them."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    random.Random(0).shuffle(files)
    found, size = [], 0
    for file in files:
        content = file.read_bytes()
        text = content.decode(errors="replace")
        if text and size < megabytes * 1e6:
            found.append(text)
            size += len(content)
    return found


def train_sentencepiece(source: Path, folder: Path) -> None:
    """As `megatron-r1 tokenizer train` does."""
    tokenizers.train(TokenizerConfig(input=[source], output=folder, vocab_size=VOCABULARY, max_documents=TRAINED_ON))


def train_byte_level(documents: list[str], folder: Path) -> None:
    """A tokenizer as most models on the hub have it: BPE over bytes, cut at words before."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(documents[:TRAINED_ON], trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


class Bench:
    """Contenders; each returns the megabytes of text that it does in a second."""

    def __init__(self, folder: Path, documents: list[str], workers: int) -> None:
        self._folder, self._documents, self._workers = folder, documents, workers
        self._megabytes = sum(len(text.encode()) for text in documents) / 1e6
        self.source = folder / "documents.jsonl"
        self.source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    def ours(self, tokenizer: Path) -> Callable[[], float]:
        """The verb, without the start of Python."""
        output = self._folder / "index"
        config = IndexConfig(inputs={"x": self.source}, output=output, tokenizer=tokenizer, workers=self._workers)

        def run() -> float:
            taken = seconds(lambda: build(config))
            shutil.rmtree(output)
            return self._megabytes / taken

        return run

    def fast(self, tokenizer: Path) -> Callable[[], float]:
        """The tokenizers library."""
        loaded = FastTokenizer.from_file(str(tokenizer / "tokenizer.json"))
        return self._bare(lambda batch: loaded.encode_batch_fast(batch, add_special_tokens=False))

    def sentencepiece(self, tokenizer: Path) -> Callable[[], float]:
        """Sentencepiece itself."""
        loaded = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        return self._bare(lambda batch: loaded.encode(batch, num_threads=self._workers))

    def _bare(self, encode: Callable[[list[str]], object]) -> Callable[[], float]:
        def loop() -> None:
            for start in range(0, len(self._documents), BATCH):
                encode(self._documents[start : start + BATCH])

        return lambda: self._megabytes / seconds(loop)


def main() -> None:
    """Print the speeds of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=32, help="of text (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, and threads (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs that are measured (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    documents = texts(options.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, documents, options.workers)
        trained, byte_level = folder / "sentencepiece", folder / "byte_level"
        train_sentencepiece(bench.source, trained)
        train_byte_level(documents, byte_level)
        comparisons = [
            Comparison(
                "a sentencepiece tokenizer",
                "MB/s",
                "sentencepiece",
                bench.ours(trained),
                bench.sentencepiece(trained),
                0.5,
            ),
            Comparison(
                "a byte-level BPE tokenizer", "MB/s", "tokenizers", bench.ours(byte_level), bench.fast(byte_level), 0.5
            ),
        ]
        measure(comparisons, options.rounds)
    report(
        "data index",
        comparisons,
        options.json,
        workers=options.workers,
        documents=len(documents),
        megabytes=options.megabytes,
    )


if __name__ == "__main__":
    main()
