"""What a GGUF file says besides its tensors: `config.json`, tokenizer and chat template in Hugging Face's words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1.model.family import HFConfig

PRE_TOKENIZERS = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
"""GGUF's names of how a text is split before it is encoded -> what comes before the splitting of GPT-2."""
_CONTROL = 3
"""GGUF's type of a token that stands for no text."""


def config_json(fields: Mapping[str, Any], tied: bool) -> HFConfig:
    """The `config.json` of a Llama-shaped model.

    Args:
        fields: the file's metadata.
        tied: the embedding is the head as well.
    """
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    tokens = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    epsilon = np.float32(fields["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),  # in other models a list
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as a 32-bit float: 1e-5 is 9.999999747378752e-06 there.
        "rms_norm_eps": float(np.format_float_positional(epsilon)),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10000.0)},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", tokens["eos"]),
        "dtype": "bfloat16",
    }


def save_companions(fields: Mapping[str, Any], config: HFConfig, folder: Path) -> None:
    """Write tokenizer, chat template and generation settings into `folder`."""
    tokenizer(fields).save_pretrained(folder)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]], byte_level])
    fast.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        **{name: pieces[number] for name, number in ids.items() if number is not None},
    )
    wrapped.chat_template = fields.get("tokenizer.chat_template")
    return wrapped
