"""Indexed datasets against Megatron's own reader and ids worked by hand; whatever the files, the workers, the kills."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1.config.corpus import IndexConfig
from megatron_r1.config.load import load
from megatron_r1.data import pieces
from megatron_r1.data.indexed import build
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError

WORDS = ["<s>", "</s>", "a", "b", "c", "<unk>"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of whole words, made by the tokenizers library alone."""
    folder = tmp_path_factory.mktemp("words")
    fast = FastTokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def read(path: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(path))
    return [dataset[number].tolist() for number in range(len(dataset))]


def write_lines(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def datasets(folder: Path) -> dict[str, bytes]:
    files = [
        file for file in sorted(folder.rglob("*")) if file.suffix in (".bin", ".idx") and ".parts" not in file.parts
    ]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_megatron_reads_the_documents_back(
    corpus: Path, tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    inputs = {name: corpus / f"{name}.jsonl" for name in ("train", "validation")}
    summary = build(IndexConfig(inputs=inputs, output=tmp_path, tokenizer=tokenizer_folder))
    for name, source in inputs.items():
        texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
        dataset = IndexedDataset(str(tmp_path / name))
        assert len(dataset) == len(texts) == summary["splits"][name]["documents"]
        assert summary["splits"][name]["tokens"] == dataset.sequence_lengths.sum()
        assert dataset[0].dtype == numpy.uint16
        assert list(dataset.document_indices) == list(range(len(texts) + 1))
        for ids, text in zip((dataset[i].tolist() for i in range(len(dataset))), texts, strict=True):
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert tokenizer.decode(ids[1:-1]) == text
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert not (tmp_path / ".parts").exists()


def test_ids_of_a_hugging_face_tokenizer_by_hand(words: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a b", "c", "b nothing a a"], "body")
    config = IndexConfig(inputs={"a": source}, output=tmp_path / "index", tokenizer=words, text_key="body")
    summary = build(config)
    assert read(tmp_path / "index/a") == [[0, 2, 3, 1], [0, 4, 1], [0, 3, 5, 2, 2, 1]]
    assert summary == {"vocab_size": 6, "splits": {"a": {"documents": 3, "tokens": 13, "longest": 6}}}
    assert (tmp_path / "index/a.bin").read_bytes() == numpy.array(
        [0, 2, 3, 1, 0, 4, 1, 0, 3, 5, 2, 2, 1], "<u2"
    ).tobytes()


def test_the_same_bytes_whatever_the_workers_and_pieces(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number, (workers, smallest) in enumerate([(1, pieces._SMALLEST), (1, 10_000), (2, 7_001), (3, 999)]):
        monkeypatch.setattr(pieces, "_SMALLEST", smallest)
        config = IndexConfig(
            inputs={"web": corpus / "train.jsonl"},
            output=tmp_path / str(number),
            tokenizer=tokenizer_folder,
            split={"train": 0.8, "test": 0.2},
            workers=workers,
        )
        build(config)
        found.append(datasets(config.output))
    assert list(found[0]) == ["web/test.bin", "web/test.idx", "web/train.bin", "web/train.idx"]
    assert found[1:] == found[:1] * 3


def test_every_format_gives_the_same(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    source = corpus / "train.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    halves = [b"".join(lines[:700]), b"".join(lines[700:])]
    texts = [json.loads(line)["text"] for line in lines]
    table = pyarrow.table({"number": range(len(texts)), "text": texts})
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    parquet.write_table(table.slice(0, 700), folder / "a.parquet", row_group_size=100)
    with pyarrow.output_stream(folder / "sub/b.jsonl.zst", compression="zstd") as stream:
        stream.write(halves[1])
    (folder / "notes.txt").write_text("not read")
    parquet.write_table(table, tmp_path / "whole.parquet", row_group_size=64)
    (tmp_path / "both.jsonl.gz").write_bytes(gzip.compress(halves[0]) + gzip.compress(halves[1]))
    for name, half in zip("ab", halves, strict=True):
        (tmp_path / f"{name}.jsonl").write_bytes(half.removesuffix(b"\n"))
    inputs: dict[str, Path | list[Path]] = {
        "plain": source,
        "folder": folder,
        "parquet": tmp_path / "whole.parquet",
        "gzip": tmp_path / "both.jsonl.gz",
        "list": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        "again": source,
    }
    build(IndexConfig(inputs=inputs, output=tmp_path / "index", tokenizer=tokenizer_folder))
    found = datasets(tmp_path / "index")
    for name in inputs:
        assert found[f"{name}.bin"] == found["plain.bin"], name
        assert found[f"{name}.idx"] == found["plain.idx"], name
    assert len(found) == 12


def test_splits_have_their_shares_and_stay(words: Path, tmp_path: Path) -> None:
    def splits(texts: list[str], output: str) -> dict[str, list[list[int]]]:
        source = write_lines(tmp_path / "source.jsonl", texts)
        split = {"train": 0.7, "validation": 0.2, "test": 0.1}
        build(IndexConfig(inputs={"x": source}, output=tmp_path / output, tokenizer=words, split=split))
        return {name: read(tmp_path / output / "x" / name) for name in split}

    ids = {"a": 2, "b": 3, "c": 4}
    texts = [" ".join("abc"[(number // 3**digit) % 3] for digit in range(8)) for number in range(3000)]
    found = splits(texts, "one")
    counts = {name: len(documents) for name, documents in found.items()}
    assert sum(counts.values()) == 3000
    for name, share in {"train": 0.7, "validation": 0.2, "test": 0.1}.items():
        assert counts[name] / 3000 == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)
    expected = [[0, *(ids[word] for word in text.split()), 1] for text in texts]
    assert sorted(document for documents in found.values() for document in documents) == sorted(expected)
    # The same documents once more and others before them: none moves, and equal ones stay together.
    more = splits(["c c", "b b b", *texts, *texts[:500]], "two")
    for name, documents in found.items():
        kept = {tuple(document) for document in documents}
        assert {tuple(document) for document in more[name]} - {(0, 4, 4, 1), (0, 3, 3, 3, 1)} == kept
        order = [document for document in more[name] if len(document) == 10]
        assert order[: len(documents)] == documents


BAD = [
    ("", "a.jsonl is empty"),
    ('{"text": "a"}\n{}\n', r"a.jsonl, line 2: .*non-empty string 'text'; its keys are \[\]"),
    ('{"text": "a"}\n' * 300 + "[]\n", "a.jsonl, line 301: .* it is a list"),
    ('{"text": "a"}\n' * 300 + '{"text": ""}\n', "a.jsonl, line 301"),
    ('{"text": "a"}\n{"text"\n', "a.jsonl, line 2: not valid JSON"),
    ('{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl, line 2: 'text' holds a lone surrogate"),
    ('{"text": "a"}\n\n', "a.jsonl, line 2: not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_input_is_named_and_leaves_no_dataset_behind(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.setattr(pieces, "_SMALLEST", 100)
    source, output = tmp_path / "a.jsonl", tmp_path / "index"
    source.write_text(content)
    with pytest.raises(DataError, match=message):
        build(IndexConfig(inputs={"train": source}, output=output, tokenizer=words))
    assert not [path for path in output.glob("*") if path.name != ".parts"]
    source.write_text('{"text": "a"}\n')  # once it is mended, the same command does it
    assert (
        build(IndexConfig(inputs={"train": source}, output=output, tokenizer=words))["splits"]["train"]["tokens"] == 3
    )
    assert datasets(output)["train.bin"] == numpy.array([0, 2, 1], "<u2").tobytes()


def test_bad_files_are_named(words: Path, tmp_path: Path) -> None:
    def fails(source: Path, message: str, **options: object) -> None:
        with pytest.raises(DataError, match=message):
            build(IndexConfig(inputs={"x": source}, output=tmp_path / "index", tokenizer=words, **options))

    fails(tmp_path / "nowhere.jsonl", r"cannot read .*nowhere\.jsonl: no such file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"empty holds no file that ends in \.jsonl, \.jsonl\.gz")
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", r"a\.parquet, row 1: ")
    fails(tmp_path / "a.parquet", r"a\.parquet has no column 'body'; it has text, n", text_key="body")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    fails(tmp_path / "b.parquet", r"cannot read .*b\.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-9])
    fails(tmp_path / "c.jsonl.gz", r"cannot read .*c\.jsonl\.gz")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100 + b"7"))
    fails(tmp_path / "d.jsonl.gz", r"d\.jsonl\.gz, line 101: .*it is a int")
    fails(write_lines(tmp_path / "e.jsonl", ["a"]), "no document falls into", split={"train": 1 - 1e-7, "test": 1e-7})
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        build(IndexConfig(inputs={"x": tmp_path / "e.jsonl"}, output=tmp_path / "index", tokenizer=tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("inputs = {}", "inputs: "),
        ('inputs = { "a/b" = "x.jsonl" }', "inputs.a/b"),
        ('inputs = { a = "x.jsonl" }\nsplit = { train = 0.9, test = 0.2 }', r"split: .*add up to 1\.1, not to 1"),
        ('inputs = { a = "x.jsonl" }\nworkers = 0', "workers: "),
    ],
)
def test_run_files_that_cannot_be(tmp_path: Path, keys: str, message: str) -> None:
    (tmp_path / "index.toml").write_text(f'output = "o"\ntokenizer = "t"\n{keys}\n')
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "index.toml", [], IndexConfig)
