"""A small corpus, and the tokenizer trained on it, shared by the tests of this folder."""

from pathlib import Path

import pytest

from megatron_r1.data.corpus import generate
from megatron_r1.data.tokenizer import Tokenizer, train
from tests.data.small_corpus import generate_config, tokenizer_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    generate(generate_config(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(tokenizer_config(corpus, folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
