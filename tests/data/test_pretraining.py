"""Rows of a corpus against the documents they were cut from, and damaged datasets."""

import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_r1.config.corpus import CorpusSection, IndexConfig, WeightedDataset
from megatron_r1.config.load import validate
from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data import indexed
from megatron_r1.data import tokenizer as tokenizers
from megatron_r1.data.pretraining import Corpus
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError

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


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if own:
        dist.destroy_process_group()


@pytest.fixture
def three(dataset: tuple[Path, Tokenizer], tmp_path: Path) -> list[Path]:
    """Datasets of one number each: 300 documents of 1, 100 of 2, 50 of 3."""
    inputs = {}
    for digit, count in (("1", 300), ("2", 100), ("3", 50)):
        source = tmp_path / f"{digit}.jsonl"
        source.write_text(f'{{"text": "{digit * 8}"}}\n' * count)
        inputs[digit] = source
    indexed.build(IndexConfig(inputs=dict(inputs), output=tmp_path / "three", tokenizer=dataset[1].path))
    return [tmp_path / "three" / digit for digit in inputs]


def origins(corpus: Corpus, tokenizer: Tokenizer, count: int) -> list[str]:
    rows = corpus.rows(0, count, torch.device("cpu")).tokens.tolist()
    return ["".join(sorted(set(tokenizer.decode(row)))) for row in rows]


def test_a_blend_has_its_shares_all_along(
    dataset: tuple[Path, Tokenizer], three: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer, weights = dataset[1], (6.0, 3.0, 1.0)
    blend = [WeightedDataset(path=path, weight=weight) for path, weight in zip(three, weights, strict=True)]
    # Many times what the small ones hold: their documents repeat.
    corpus = Corpus(blend, tokenizer, LENGTH, 1000, tmp_path / "cache", 0)
    found = origins(corpus, tokenizer, 1000)
    for count in (10, 100, 501, 1000):
        for digit, weight in zip("123", weights, strict=True):
            assert found[:count].count(digit) == pytest.approx(count * weight / 10, abs=1), (digit, count)
    request.getfixturevalue("process_group")
    for _ in range(2):  # under a process group the order of the blend is kept on the disk, and then read from there
        again = Corpus(blend, tokenizer, LENGTH, 1000, tmp_path / "other", 0)
        assert origins(again, tokenizer, 1000) == found


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 20])
def test_a_short_blend_of_many(dataset: tuple[Path, Tokenizer], three: list[Path], tmp_path: Path, rows: int) -> None:
    blend = [WeightedDataset(path=path, weight=weight) for path, weight in zip(three, (90.0, 5.0, 5.0), strict=True)]
    found = origins(Corpus(blend, dataset[1], LENGTH, rows, tmp_path / "cache", 0), dataset[1], rows)
    assert found.count("1") == pytest.approx(0.9 * rows, abs=1)


def test_without_weights_tokens_count_and_documents_repeat(
    dataset: tuple[Path, Tokenizer], three: list[Path], tmp_path: Path
) -> None:
    found = origins(Corpus(three, dataset[1], LENGTH, 900, tmp_path / "cache", 0), dataset[1], 900)
    for digit, documents in zip("123", (300, 100, 50), strict=True):
        assert found.count(digit) == pytest.approx(900 * documents / 450, abs=1)


def test_another_blend_builds_the_index_anew(
    dataset: tuple[Path, Tokenizer], three: list[Path], tmp_path: Path
) -> None:
    for weight, expected in ((1.0, 50), (3.0, 75)):
        blend = [WeightedDataset(path=three[0], weight=weight), WeightedDataset(path=three[1], weight=1.0)]
        found = origins(Corpus(blend, dataset[1], LENGTH, 100, tmp_path / "cache", 0), dataset[1], 100)
        assert found.count("1") == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("train = []", "`train` names no dataset"),
        ('train = ["a", "b", "a"]', "a is named twice"),
        ('train = [{ path = "a", weight = 0.0 }]', r"train.*0\.weight: Input should be greater than 0"),
        ('train = ["a", { path = "b", weight = 1.0 }]', r"train.*: Input should be an object \(it is 'a'\)"),
        ('train = ["a"]\nfim_rate = 1.5', "fim_rate"),
    ],
)
def test_sections_that_cannot_be(keys: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(CorpusSection, tomllib.loads(f"sequence_length = 8\n{keys}"), "[corpus]")
