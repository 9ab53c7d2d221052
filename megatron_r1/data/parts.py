"""What one worker of `data index` writes of one piece, and how it is found again after a kill.

A part is named by a hash of all that it depends on. So a part that is there is right, whatever has happened since it
was written: a killed run, another number of workers, a changed input.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from megatron_r1.data.files import aside
from megatron_r1.data.pieces import Piece, documents
from megatron_r1.data.tokenizer import Tokenizer

_BATCH = 64
"""Documents tokenized at once."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_FORMAT = 1
"""Counted up when parts are written differently."""


@dataclass(frozen=True)
class Part:
    """The tokens of one piece: a `.bin` file for each split, and a `.npz` file with the lengths of its documents.

    The latter is written last: it says that the part is whole.
    """

    stem: Path

    def tokens(self, split: str) -> Path:
        """The file with the tokens of one split, without any header."""
        return self.stem.with_name(f"{self.stem.name}.{split}.bin")

    @property
    def _lengths(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.npz")

    def whole(self) -> bool:
        """Has it been written to its end?"""
        return self._lengths.exists()

    def lengths(self, split: str) -> "numpy.ndarray[Any, Any]":
        """Tokens of each document of one split."""
        with numpy.load(self._lengths) as arrays:
            found: numpy.ndarray[Any, Any] = arrays[split]
        return found

    def finish(self, lengths: dict[str, list[int]]) -> None:
        """Write the lengths."""
        arrays: dict[str, Any] = {split: numpy.array(found, numpy.int32) for split, found in lengths.items()}
        with aside(self._lengths) as partial, partial.open("wb") as file:
            numpy.savez(file, **arrays)


class Writer:
    """Pieces to parts.

    Args:
        folder: of the parts.
        tokenizer: its documents are `[bos] + ids + [eos]`.
        text_key: where a document's text is.
        dtype: of a token on the disk.
        split: name -> share of the documents.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, text_key: str, dtype: type[Any], split: dict[str, float]
    ) -> None:
        self._folder, self._tokenizer, self._key, self._dtype = folder, tokenizer, text_key, dtype
        self._split = split
        contents = [
            (tokenizer.path / name).read_bytes() for name in _TOKENIZER_FILES if (tokenizer.path / name).exists()
        ]
        self._identity = [_FORMAT, text_key, split, [hashlib.blake2b(content).hexdigest() for content in contents]]

    def part(self, piece: Piece) -> Part:
        """Where the part of a piece is, or will be."""
        facts = {**asdict(piece), "path": str(piece.path.resolve())}
        digest = hashlib.blake2b(json.dumps([self._identity, facts]).encode(), digest_size=16)
        return Part(self._folder / digest.hexdigest())

    def write(self, piece: Piece) -> int:
        """Tokenize a piece; returns how many documents it has.

        Raises:
            DataError: a line that holds no document.
        """
        part = self.part(piece)
        lengths: dict[str, list[int]] = {split: [] for split in self._split}
        with ExitStack() as stack:
            files = {split: stack.enter_context(part.tokens(split).open("wb")) for split in self._split}
            for text, ids in self._encoded(documents(piece, self._key)):
                split = share_of(text, self._split)
                files[split].write(numpy.array(ids, self._dtype).tobytes())
                lengths[split].append(len(ids))
        part.finish(lengths)
        return sum(map(len, lengths.values()))

    def _encoded(self, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
        texts = iter(texts)
        while batch := list(islice(texts, _BATCH)):
            yield from zip(batch, self._tokenizer.encode_documents(batch), strict=True)


def share_of(text: str, shares: dict[str, float]) -> str:
    """The split that a document falls into: a hash of its text, as a number in [0, 1), on the line of the shares."""
    if len(shares) > 1:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "big") / 2**64
        for split, share in shares.items():
            left -= share
            if left < 0:
                return split
    return list(shares)[-1]
