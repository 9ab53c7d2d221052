"""A model folder with a tokenizer, and a data set of sums."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.corpus import generate
from megatron_r1.data.tokenizer import train
from tests.data.small_corpus import TAGS, generate_config
from tests.rollout.tiny_model import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, and a tokenizer for sums."""
    corpus = tmp_path_factory.mktemp("corpus")
    generate(generate_config(corpus, documents=400, heldout=None, heldout_questions=0))
    folder = write_model(tmp_path_factory.mktemp("model"), seed=1)
    train(TokenizerConfig(input=[corpus / "train.jsonl"], output=folder, vocab_size=384, special_tokens=TAGS))
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """`a + 1 = ?` for a from 0 to 10: solved never, sometimes, always; then one that nobody can judge."""
    rows: list[dict[str, Any]] = [{"id": a, "problem": f"{a} + 1 = ?", "answer": str(a + 1)} for a in range(11)]
    rows.append({"id": 11, "problem": "5 + 5 = ?", "answer": "?"})
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
