"""A tiny Llama, trained by hand to call a tool: each token of a script makes the next one likely, whatever came before.

The other weights are random, so that log-probabilities depend on everything before a token.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.tokenizer import Tokenizer, train

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
CALL = ":<think><tool_call>print(6*7)</tool_call>"
"""After a prompt that ends in a colon."""
ANSWER = "\n</think><answer>42</answer>"
"""After a reply that ends in a line break."""
LETTERS = "".join(map(chr, range(33, 127)))
VOCABULARY = 4 + 256 + len(TAGS) + len(LETTERS) + 1  # with the space


def write_tokenizer(folder: Path) -> Path:
    """One token a character, and one a tag."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "letters.jsonl"
    text.write_text(json.dumps({"text": " ".join(LETTERS)}) + "\n")
    train(TokenizerConfig(input=[text], output=folder, vocab_size=VOCABULARY, special_tokens=TAGS))
    return folder


def write_model(folder: Path, seed: int = 0, strength: float = 14.0) -> Path:
    """`strength`: logit of the next token of the script, above others' of about 1."""
    tokenizer = Tokenizer.load(write_tokenizer(folder))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.08,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()
        for text in (CALL, ANSWER):
            tokens = [*tokenizer.encode(text), *([tokenizer.eos_id] if text is ANSWER else [])]
            for token, following in pairwise(tokens):
                direction = embedding[token] / embedding[token].square().mean().sqrt()
                head[following] += strength * direction / config.hidden_size
    model.save_pretrained(folder)
    return folder
