"""Rows of chats, and tokenizers that they are written for."""

import json
from pathlib import Path
from typing import Any

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.config.sft import ChatsSection
from megatron_r1.data.files import write_lines
from megatron_r1.data.tokenizer import Tokenizer, train

VOCABULARY = 312
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "Assistant:{{ message.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}User: {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:<think>\n{% endif %}"
)
"""As DeepSeek-R1's: it strips the reasoning from answers, and begins that of the answer that is asked for."""


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A row as `collect` writes it."""
    total = number + 2
    return {
        "prompt": f"User: {number} + 2? Assistant:",
        "response": f" <think>{number}+2={total}</think> <answer>{total}</answer>",
        "domain": "math" if number % 2 else "logic",
    } | changes


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer for such rows, as `tokenizer train` makes it."""
    texts = [row(number) for number in range(300)]
    write_lines(folder / "text.jsonl", [{"text": text["prompt"] + text["response"]} for text in texts])
    tokenizer = folder / "tokenizer"
    train(
        TokenizerConfig(
            input=[folder / "text.jsonl"], output=tokenizer, vocab_size=VOCABULARY, special_tokens=TAGS, seed=0
        )
    )
    return tokenizer


def with_template(tokenizer: Path, folder: Path, template: str = TEMPLATE, **settings: Any) -> Tokenizer:
    """The same tokenizer with a chat template and, as those that have one, special tokens known in texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"split_special_tokens": False, "chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def source(folder: Path, *rows: dict[str, Any], **settings: Any) -> ChatsSection:
    """A file of these rows."""
    path = folder / "chats.jsonl"
    write_lines(path, rows)
    return ChatsSection(path=str(path), **settings)
