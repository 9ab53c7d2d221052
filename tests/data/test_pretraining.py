"""Rows of a corpus against the documents they were cut from, and damaged datasets."""

import itertools
from pathlib import Path

import pytest
import torch

from megatron_r1.config.runs import IndexConfig, TokenizerConfig
from megatron_r1.data import indexed
from megatron_r1.data import tokenizer as tokenizers
from megatron_r1.data.pretraining import Corpus
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

TEXTS = [f"{a} + {b} = {a + b}" for a in range(12) for b in range(12)]
LENGTH = 32


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Tokenizer]:
    source = tmp_path / "train.jsonl"
    source.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    folder = tmp_path / "tokenizer"
    tokenizers.train(TokenizerConfig(input=[source], output=folder, vocab_size=274))
    indexed.build(IndexConfig(inputs={"train": source}, output=tmp_path / "index", tokenizer=folder))
    return tmp_path / "index" / "train", Tokenizer.load(folder)


def corpus(path: Path, tokenizer: Tokenizer, cache: Path, seed: int = 0, rows: int = 20) -> Corpus:
    return Corpus([path], tokenizer, LENGTH, rows, cache, seed)


def test_rows_hold_the_documents_and_labels_are_one_further(dataset: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    path, tokenizer = dataset
    rows = corpus(path, tokenizer, tmp_path / "cache").rows(0, 20, torch.device("cpu"))
    assert rows.tokens.shape == rows.labels.shape == (20, LENGTH)
    assert torch.equal(rows.tokens[:, 1:], rows.labels[:, :-1])
    whole = 0
    for row in rows.tokens.tolist():
        ends = [place for place, token in enumerate(row) if token == tokenizer.eos_id]
        for start, end in itertools.pairwise(ends):
            assert tokenizer.decode(row[start + 1 : end]) in TEXTS
            whole += 1
    assert whole >= 10


def test_rows_depend_on_number_and_seed_alone(dataset: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    first = corpus(*dataset, tmp_path / "a").rows(5, 3, torch.device("cpu")).tokens
    again = corpus(*dataset, tmp_path / "b").rows(5, 3, torch.device("cpu")).tokens
    other = corpus(*dataset, tmp_path / "c", seed=1).rows(5, 3, torch.device("cpu")).tokens
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_index_that_a_killed_run_left_is_built_anew(dataset: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    expected = corpus(*dataset, tmp_path / "cache").rows(0, 5, torch.device("cpu")).tokens
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:40])
    (tmp_path / "cache" / "whole").unlink()
    assert torch.equal(corpus(*dataset, tmp_path / "cache").rows(0, 5, torch.device("cpu")).tokens, expected)


def test_an_index_of_other_data_is_built_anew(dataset: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    path, tokenizer = dataset
    before = corpus(path, tokenizer, tmp_path / "cache").rows(0, 5, torch.device("cpu")).tokens
    source = tmp_path / "train.jsonl"
    source.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS[::-1][:100]))
    indexed.build(IndexConfig(inputs={"train": source}, output=path.parent, tokenizer=tokenizer.path))
    after = corpus(path, tokenizer, tmp_path / "cache").rows(0, 5, torch.device("cpu")).tokens
    fresh = corpus(path, tokenizer, tmp_path / "fresh").rows(0, 5, torch.device("cpu")).tokens
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_missing_and_damaged_datasets(dataset: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    path, tokenizer = dataset
    with pytest.raises(DataError, match=r"no indexed dataset .*nowhere\.idx"):
        corpus(tmp_path / "nowhere", tokenizer, tmp_path / "cache")
    path.with_name("train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="cannot read the indexed dataset"):
        corpus(path, tokenizer, tmp_path / "cache")
    path.with_name("train.idx").write_bytes(b"no index")
    with pytest.raises(DataError, match="cannot read the indexed dataset"):
        corpus(path, tokenizer, tmp_path / "cache")
