"""The small chain_sum corpus that the tests of this folder train and index."""

from pathlib import Path

from megatron_r1.config.generate import GenerateConfig
from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.config.sections import TaskSection

TASK = {"type": "reasoning_gym", "dataset": "chain_sum", "options": {"min_terms": 3, "max_terms": 4, "max_digits": 1}}
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
STYLES = ["careful", "checked", "slip", "guess", "bare"]
HELDOUT = TaskSection(task=TASK, template="r1_zero_short")


def generate_config(output: Path, **changes: object) -> GenerateConfig:
    values: dict[str, object] = {
        "output": output,
        "task": TASK,
        "documents": 1500,
        "validation_documents": 50,
        "template": "r1_zero_short",
        "quality": dict.fromkeys(STYLES, 1.0),
        "heldout": HELDOUT,
        "heldout_questions": 300,
    }
    return GenerateConfig.model_validate(values | changes)


def tokenizer_config(corpus: Path, output: Path, vocab_size: int = 384) -> TokenizerConfig:
    return TokenizerConfig(input=[corpus / "train.jsonl"], output=output, vocab_size=vocab_size, special_tokens=TAGS)
