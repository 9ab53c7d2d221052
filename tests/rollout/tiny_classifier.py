"""Tiny reward models with random weights, and a tokenizer for them."""

import json
from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.corpus import generate
from megatron_r1.data.tokenizer import train
from tests.data.small_corpus import TAGS, generate_config
from tests.rollout.tiny_model import VOCABULARY, write_model


def write_tokenizer(corpus: Path, folder: Path) -> None:
    """A tokenizer for sums; `corpus` is an empty folder to work in."""
    generate(generate_config(corpus, documents=400, heldout=None, heldout_questions=0))
    train(TokenizerConfig(input=[corpus / "train.jsonl"], output=folder, vocab_size=384, special_tokens=TAGS))


def write_deepseek(folder: Path, seed: int) -> Path:
    """The shape of `tiny_model.write_model`, with one label."""
    base = write_model(folder.with_name(folder.name + "-base"), seed)
    config = DeepseekV3Config.from_pretrained(base, num_labels=1, pad_token_id=3)
    written = _write(DeepseekV3ForSequenceClassification(config), folder)
    file = folder / "config.json"  # transformers leaves these two out
    file.write_text(json.dumps(json.loads(file.read_text()) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}))
    return written


def write_llama(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2, num_labels=1, bos_token_id=1,
        eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return _write(LlamaForSequenceClassification(config), folder)


def _write(model: PreTrainedModel, folder: Path) -> Path:
    model.float().save_pretrained(folder)
    return folder
