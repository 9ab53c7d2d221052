"""A GGUF file of a Llama-shaped model, llama.cpp's format, as a source of conversions.

Whatever the file's own numbers (float32, float16, blocks of 2 to 8 bits), its tensors appear in bfloat16. Apart from
names, GGUF differs from Hugging Face in the order of the rows of the query and key matrices: its rotary embedding turns
neighbouring rows of a head together, Hugging Face's row i and row i + half.
"""

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import quants

from megatron_r1.checkpoint.gguf_metadata import PRE_TOKENIZERS, config_json, save_companions
from megatron_r1.checkpoint.source import Source
from megatron_r1.errors import DataError
from megatron_r1.model.build import rules
from megatron_r1.model.family import Rule
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.model.sharding import layout

_SUPPORTED = {
    "general.architecture": ("llama",),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": tuple(PRE_TOKENIZERS),
    "llama.rope.scaling.type": ("none", None),
}
_IN_LAYER = {
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
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_EXPANDED_BYTES = 2**26
"""Of float32, at a time."""


class GgufSource(Source):
    """A file of a plain Llama model with a byte-level BPE tokenizer.

    Raises:
        DataError: no such file, damaged, or another kind of model.
    """

    def __init__(self, path: Path) -> None:
        self._path, (reader, fields) = path, read_header(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._companions = tempfile.TemporaryDirectory()  # goes with this object
        self.folder, self.files = Path(self._companions.name), [path]
        try:
            self.hf = config_json(fields, tied=f"{_OUTSIDE['lm_head']}.weight" not in self._tensors)
            save_companions(fields, self.hf, self.folder)
        except KeyError as error:
            raise DataError(f"{path} does not say {error.args[0]}, which a Llama model needs") from error
        except Exception as error:  # `tokenizers` raises no other class
            raise DataError(f"{path} contradicts itself in what it says of model and tokenizer: {error}") from error
        self.rules, self.places = rules(self.hf), layout(self.hf)

    def __contains__(self, name: object) -> bool:
        return gguf_name(str(name)) in self._tensors

    def unknown(self) -> list[str]:
        """GGUF's names of what a plain Llama model does not have: experts, biases, factors of its rotary embedding."""
        known = {gguf_name(name) for rule in self.rules for name in rule.hf}
        return [name for name in self._tensors if name not in known]

    def spec(self, name: str) -> Spec:
        """As `read` gives it."""
        return Spec(torch.bfloat16, _shape(self._tensors[gguf_name(name)]))

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The tensors of a rule, expanded, in Hugging Face's order of rows."""
        return [self.tensor(name) for name in rule.hf]

    def stored(self, rule: Rule) -> list[Spec]:
        """As they stand in the file: blocks of a few bits as their bytes."""
        tensors = [self._tensors[gguf_name(name)] for name in rule.hf]
        return [Spec(torch.from_numpy(tensor.data[:0].copy()).dtype, tensor.data.shape) for tensor in tensors]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name.

        Read and expanded some rows at a time; `gguf`'s map of the file is not used, because its pages would stay.
        """
        tensor = self._tensors[gguf_name(name)]
        shape, stored = _shape(tensor), tensor.data
        rows = max(1, _EXPANDED_BYTES // (4 * shape[-1]))
        whole, row_bytes = torch.empty(shape, dtype=torch.bfloat16), stored.nbytes // shape[0]
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first)
            piece = np.empty((count, *stored.shape[1:]), stored.dtype)
            values = self._fill(piece, tensor.data_offset + first * row_bytes)
            whole[first : first + count] = torch.from_numpy(quants.dequantize(values, tensor.tensor_type))
        heads = _HEADS.get(name.split(".")[-2])
        return halves_apart(whole, self.hf[heads]) if heads else whole

    def _fill(self, values: Any, offset: int) -> Any:
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                if file.readinto(values.view(np.uint8).data) < values.nbytes:
                    raise DataError(f"{self._path} is truncated: it has become shorter since it was opened")
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror}") from error
        return values


def read_header(path: Path) -> tuple[Any, dict[str, Any]]:
    """The file's reader and its metadata.

    Raises:
        DataError: as `GgufSource`.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, LookupError) as error:  # the reader checks no length: IndexError = cut short
        raise DataError(f"{path} cannot be read as GGUF: {error}") from error
    for key, supported in _SUPPORTED.items():
        if fields.get(key) not in supported:
            only = " or ".join(map(repr, supported))
            raise DataError(f"{path}: {key} is {fields.get(key)!r}; only {only} is supported")
    for tensor in reader.tensors:
        if not expandable(tensor.tensor_type):
            raise DataError(f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which gguf cannot expand")
    return reader, fields


def expandable(kind: Any) -> bool:
    """Whether the package `gguf` can make floating-point numbers of this type; tried on one block of zeros."""
    try:
        quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor; "" if it has none."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_OUTSIDE[module]}.{kind}" if module in _OUTSIDE else ""
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_IN_LAYER[inner]}.{kind}" if inner in _IN_LAYER else ""


def halves_apart(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from the order 0, half, 1, half + 1 ... back to 0, 1, ... `[heads * head_dim, hidden]`"""
    pairs = rows.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).contiguous().view(rows.shape)


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF names the innermost dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))
