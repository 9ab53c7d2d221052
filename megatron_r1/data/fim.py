"""Filling in the middle: some documents are rearranged so that a model learns to write what stands between two parts.

DeepSeek-V3 (arXiv 2412.19437, 4.1) has 10 % of the documents, before they are packed, in the form prefix, suffix,
middle (PSM): `<|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle <|eos|>`. Here both cuts are uniform over the
places between tokens, the ends included; Bavarian et al. (arXiv 2207.14255) cut between characters, and V3's paper does
not say which it does.

Documents are rearranged as they are read. Which ones, and where they are cut, depends on nothing but the seed and the
number of the document, so a row stays a function of its number.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy

from megatron_r1.compat import megatron_cpu
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed

megatron_cpu.enable()
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

Ids: TypeAlias = numpy.ndarray[Any, Any]

MARKS = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # StarCoder, Qwen
)
"""Before the prefix, before the suffix, before the middle."""


@dataclass(frozen=True)
class Fim:
    """How documents are rearranged."""

    rate: float
    """Share of the documents."""
    seed: int
    marks: tuple[int, int, int]
    """Ids of `MARKS`."""
    bos: int | None
    eos: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, seed: int) -> "Fim":
        """With the marks that `tokenizer` has.

        Raises:
            ConfigError: it has none.
        """
        for names in MARKS:
            begin, hole, end = map(tokenizer.id_of, names)
            if begin is not None and hole is not None and end is not None:
                return cls(rate, seed, (begin, hole, end), tokenizer.bos_id, tokenizer.eos_id)
        raise ConfigError(
            f"fim_rate {rate:g}: the tokenizer in {tokenizer.path} lacks {', '.join(MARKS[0])}: train it with these "
            "among its `special_tokens`, or leave fim_rate 0"
        )

    def chosen(self, documents: int) -> Ids:
        """Which of the first `documents` documents are rearranged. bool [documents]"""
        numbers = numpy.random.Generator(numpy.random.Philox(stream_seed("fim", self.seed)))
        return numbers.random(documents, numpy.float32) < self.rate

    def rearranged(self, ids: Ids, document: int) -> Ids:
        """Document number `document` in the form prefix, suffix, middle. [tokens] -> [tokens + 3]

        A begin token stays at its start, an end token at its end.
        """
        first = int(len(ids) > 0 and ids[0] == self.bos)
        last = len(ids) - int(len(ids) > first and ids[-1] == self.eos)
        draw = numpy.random.default_rng([stream_seed("fim cut", self.seed), document])
        start, stop = sorted(draw.integers(first, last, size=2, endpoint=True))
        begin, hole, end = (numpy.array([mark], ids.dtype) for mark in self.marks)
        return numpy.concatenate(
            [ids[:first], begin, ids[first:start], hole, ids[stop:last], end, ids[start:stop], ids[last:]]
        )


class FimDocuments:
    """An indexed dataset whose chosen documents are rearranged: what Megatron's GPTDataset asks of one."""

    def __init__(self, documents: IndexedDataset, fim: Fim) -> None:
        self._documents, self._fim = documents, fim
        self._chosen = fim.chosen(len(documents))
        self.sequence_lengths: Ids = documents.sequence_lengths + numpy.int32(len(fim.marks)) * self._chosen
        """int32 [documents]"""

    def __len__(self) -> int:
        return len(self._documents)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Ids:
        """`length` tokens of one document from `offset` on."""
        if not self._chosen[idx]:
            found: Ids = self._documents.get(idx, offset, length)
            return found
        ids = self._fim.rearranged(self._documents.get(idx), int(idx))
        return ids[offset:] if length is None else ids[offset : offset + length]
