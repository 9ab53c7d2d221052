import json
from pathlib import Path

import numpy
import pytest

from megatron_r1.config.runs import IndexConfig
from megatron_r1.data.indexed import build
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError


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


def test_bad_input_is_named_and_leaves_nothing_behind(tokenizer_folder: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "a.jsonl", tmp_path / "index"
    for content, message in (("", "a.jsonl is empty"), ('{"text": "a"}\n{}\n', "a.jsonl, line 2")):
        source.write_text(content)
        with pytest.raises(DataError, match=message):
            build(IndexConfig(inputs={"train": source}, output=output, tokenizer=tokenizer_folder))
        assert not list(output.iterdir())
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        build(IndexConfig(inputs={"train": source}, output=output, tokenizer=tmp_path))
