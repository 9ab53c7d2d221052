"""Model folders of scripted engines, with a tokenizer for sums, and a data set of sums."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.corpus import generate
from megatron_r1.data.tokenizer import train
from tests.curate.speaking import SCRIPTS
from tests.data.small_corpus import TAGS, generate_config


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for sums."""
    corpus = tmp_path_factory.mktemp("corpus")
    generate(generate_config(corpus, documents=400, heldout=None, heldout_questions=0))
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TokenizerConfig(input=[corpus / "train.jsonl"], output=folder, vocab_size=384, special_tokens=TAGS))
    return folder


@pytest.fixture(scope="session")
def models(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each script, without weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in SCRIPTS:
        shutil.copytree(tokenizer, folder / name)
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """`a + b = ?`, twelve of them."""
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"What is {a} + {a + 2} ?", "answer": str(2 * a + 2)} for a in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
