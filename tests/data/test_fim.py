"""Filling in the middle: by hand, and that a document can be put together again."""

import itertools
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from megatron_r1.data.fim import MARKS, Fim, FimDocuments
from megatron_r1.data.pretraining import Corpus
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

BOS, EOS, BEGIN, HOLE, END = range(5)
LENGTH = 32


def write_dataset(path: Path, documents: list[list[int]]) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", numpy.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{path}.idx")
    return path


def write_tokenizer(folder: Path, marks: tuple[str, ...]) -> Tokenizer:
    words = ["<s>", "</s>", *marks, *(f"w{number}" for number in range(600))]
    fast = FastTokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return Tokenizer.load(folder)


def restored(ids: list[int]) -> tuple[list[int], bool]:
    """The document as it was, and whether it had been rearranged."""
    if BEGIN not in ids:
        return ids, False
    begin, hole, end = (ids.index(mark) for mark in (BEGIN, HOLE, END))
    assert begin < hole < end
    last = len(ids) - (ids[-1] == EOS)
    return [*ids[:begin], *ids[begin + 1 : hole], *ids[end + 1 : last], *ids[hole + 1 : end], *ids[last:]], True


def fim(rate: float = 1.0, seed: int = 0) -> Fim:
    return Fim(rate, seed, (BEGIN, HOLE, END), BOS, EOS)


@given(
    body=st.lists(st.integers(5, 99), max_size=12), begun=st.booleans(), ended=st.booleans(), number=st.integers(0, 9)
)
def test_a_document_can_be_put_together_again(body: list[int], begun: bool, ended: bool, number: int) -> None:
    ids = numpy.array([BOS] * begun + body + [EOS] * ended, numpy.uint16)
    found = fim().rearranged(ids, number)
    assert found.dtype == ids.dtype
    assert len(found) == len(ids) + 3
    assert restored(found.tolist()) == (ids.tolist(), True)
    assert found[:1].tolist() == [BOS] if begun else found[0] == BEGIN


def test_all_cuts_of_three_tokens_come_as_often_as_uniform_cuts_do() -> None:
    ids = numpy.array([BOS, 7, 8, 9, EOS], numpy.uint16)
    found = [tuple(fim().rearranged(ids, number).tolist()) for number in range(4000)]
    expected = {}
    for cuts in itertools.product(range(4), repeat=2):  # the places before 7, 8, 9 and after 9
        start, stop = sorted(cuts)
        prefix, middle, suffix = [7, 8, 9][:start], [7, 8, 9][start:stop], [7, 8, 9][stop:]
        key = (BOS, BEGIN, *prefix, HOLE, *suffix, END, *middle, EOS)
        expected[key] = expected.get(key, 0) + 1 / 16
    assert set(found) == set(expected)
    assert (BOS, BEGIN, 7, HOLE, 9, END, 8, EOS) in expected
    for key, share in expected.items():
        assert found.count(key) / 4000 == pytest.approx(share, abs=4 * (share / 4000) ** 0.5)


def test_the_share_of_documents_and_that_it_depends_on_seed_and_number() -> None:
    chosen = fim(0.1).chosen(20_000)
    assert chosen.mean() == pytest.approx(0.1, abs=4 * (0.09 / 20_000) ** 0.5)
    assert (chosen[:500] == fim(0.1).chosen(500)).all()
    assert (chosen != fim(0.1, seed=1).chosen(20_000)).any()
    assert fim(1.0).chosen(1000).all()


def test_any_slice_of_a_dataset(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    originals = [[BOS, *range(10, 10 + length), EOS] for length in range(3, 40)]
    plain = IndexedDataset(str(write_dataset(tmp_path / "a", originals)))
    documents = FimDocuments(plain, fim(0.5))
    chosen = 0
    for number, original in enumerate(originals):
        whole = documents.get(number).tolist()
        assert len(whole) == documents.sequence_lengths[number]
        assert documents.get(number, 2, 3).tolist() == whole[2:5]
        assert documents.get(number, 1).tolist() == whole[1:]
        found, rearranged = restored(whole)
        assert found == original
        chosen += rearranged
    assert 5 < chosen < 35
    assert documents.sequence_lengths.dtype == numpy.int32


@pytest.mark.parametrize("marks", MARKS)
def test_rows_of_a_corpus(tmp_path: Path, marks: tuple[str, ...]) -> None:
    """One epoch, its rows put in order: every document stands in them once, a tenth of them rearranged."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", marks)
    originals = [
        [BOS, *(5 + (number * 7 + place) % 600 for place in range(3 + number % 50)), EOS] for number in range(600)
    ]
    path = write_dataset(tmp_path / "a", originals)
    count = (sum(map(len, originals)) + 60) // LENGTH
    corpus = Corpus([path], tokenizer, LENGTH, count, tmp_path / "cache", 3, fim_rate=0.2)
    rows = corpus.rows(0, count, torch.device("cpu"))
    again = Corpus([path], tokenizer, LENGTH, count, tmp_path / "other", 3, fim_rate=0.2).rows(
        7, 1, torch.device("cpu")
    )
    assert torch.equal(again.tokens[0], rows.tokens[7])
    known, seen = {tuple(document) for document in originals}, []
    for row in rows.tokens.tolist():
        ends = [place for place, token in enumerate(row) if token == EOS]
        for start, stop in itertools.pairwise(ends):
            document, rearranged = restored(row[start + 1 : stop + 1])
            assert tuple(document) in known
            seen.append(rearranged)
    assert len(seen) > 100
    assert sum(seen) / len(seen) == pytest.approx(0.2, abs=0.1)


def test_a_tokenizer_without_the_marks(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", MARKS[0][:2])
    path = write_dataset(tmp_path / "a", [[BOS, 6, EOS]] * 50)
    with pytest.raises(ConfigError, match=r"fim_rate 0\.1: .*tokenizer lacks .*<\|fim_end\|>.*`special_tokens`"):
        Corpus([path], tokenizer, LENGTH, 2, tmp_path / "cache", 0, fim_rate=0.1)
    Corpus([path], tokenizer, LENGTH, 2, tmp_path / "cache", 0)
