"""Python's standard library as a corpus, and the run files that learn it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.corpus import IndexConfig
from megatron_r1.config.load import load
from megatron_r1.config.runs import PretrainConfig, TokenizerConfig
from megatron_r1.data.fim import MARKS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/python_library"
documents = runpy.run_path(str(FOLDER / "documents.py"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, FOLDER / "documents.py", folder], cwd=ROOT, check=True, capture_output=True)
    return folder


def rows(file: Path) -> dict[str, str]:
    return {row["name"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}


def test_the_library_of_this_python(corpus: Path) -> None:
    train, validation = rows(corpus / "train.jsonl"), rows(corpus / "validation.jsonl")
    assert not set(train) & set(validation)
    everything = train | validation
    assert 0.02 < len(validation) / len(everything) < 0.08
    assert sum(map(len, everything.values())) > 6e6
    assert everything["json/decoder.py"].expandtabs(4) == Path(json.decoder.__file__).read_text()
    assert 'The "if" statement' in everything["help/if"]
    summary = json.loads((corpus / "summary.json").read_text())
    assert (summary["train_documents"], summary["validation_documents"]) == (len(train), len(validation))
    assert summary["validation_bytes"] == sum(len(text.encode()) for text in validation.values())


def test_again_it_is_the_same(corpus: Path) -> None:
    parts = rows(corpus / "train.jsonl") | rows(corpus / "validation.jsonl")
    assert dict([*documents["modules"](documents["LIBRARY"]), *documents["language"]()]) == parts


def test_what_is_left_out(tmp_path: Path) -> None:
    sources = {
        "a.py": b"x = 1\n",
        "b/c.py": b"# coding: latin-1\nif x:\n        y = '\xe4'\n",
        "empty.py": b"\n",
        "b/test/test_c.py": b"x = 1\n",
        "site-packages/numpy.py": b"x = 1\n",
        "_sysconfigdata__linux.py": b"x = 1\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source)
    found = dict(documents["modules"](tmp_path))
    assert found == {"a.py": "x = 1\n", "b/c.py": "# coding: latin-1\nif x:\n\t\ty = 'ä'\n"}


@pytest.mark.parametrize(
    ("text", "tabbed"),
    [("    x", "\tx"), ("          x    y", "\t\t  x    y"), ("   x", "   x"), ("a\n    b\n", "a\n\tb\n")],
)
def test_indentation(text: str, tabbed: str) -> None:
    assert documents["tabbed"](text) == tabbed


def test_each_run_file_reads_what_the_one_before_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tokenizer = load(FOLDER / "tokenizer.toml", [], TokenizerConfig)
    index = load(FOLDER / "index.toml", [], IndexConfig)
    pretrain = load(FOLDER / "pretrain.toml", [], PretrainConfig)
    corpus = Path("runs/python_library/corpus")
    assert str(corpus) in (FOLDER / "README.md").read_text()
    assert tokenizer.input == [corpus / "train.jsonl"]
    assert index.inputs == {part: corpus / f"{part}.jsonl" for part in ("train", "validation")}
    assert index.tokenizer == pretrain.tokenizer == tokenizer.output
    assert pretrain.corpus.train == [index.output / "train"]
    assert pretrain.corpus.validation == [index.output / "validation"]
    model = json.loads((pretrain.model.path / "config.json").read_text())
    assert model["vocab_size"] == tokenizer.vocab_size
    assert model["max_position_embeddings"] >= pretrain.corpus.sequence_length
    assert pretrain.corpus.fim_rate > 0
    assert tuple(tokenizer.special_tokens) in MARKS
    assert pretrain.parallel.fewest == pretrain.parallel.processes == 2
    assert pretrain.parallel.tensor == pretrain.parallel.expert == 2
