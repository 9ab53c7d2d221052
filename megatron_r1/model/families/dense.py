"""What Llama, Qwen2 and Qwen3 share: pre-norm blocks of grouped-query attention and a gated MLP.

Grouped-query attention: arXiv 2305.13245. SwiGLU: arXiv 2002.05202. The three differ in the bias of the attention's
inputs and in the norm of queries and keys; Mixtral and Qwen3-MoE have experts in the MLP's place.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError
from megatron_r1.model.family import HFConfig, Rule, gated_mlp, plain_modules, refuse_other, require

MlpRules = Callable[[int, str, str], Iterator[Rule]]
"""A layer's number, its Megatron prefix and its Hugging Face prefix -> the rules of what follows its attention."""


def dense_config(hf: HFConfig, section: ModelSection, **family: Any) -> TransformerConfig:
    """Megatron's config of a dense model, or of a mixture of experts when `family` has them.

    Args:
        hf: its `config.json`.
        section: the run's [model].
        family: what sets the family apart.

    Raises:
        DataError: a key is missing, or has a value that Megatron's modules do not implement.
    """
    require(hf, "hidden_act", "silu")
    heads, groups = require(hf, "num_attention_heads"), key_value_heads(hf)
    if heads % groups:
        raise DataError(f"config.json: {heads} attention heads do not divide by num_key_value_heads {groups}")
    return TransformerConfig(
        num_layers=require(hf, "num_hidden_layers"),
        hidden_size=require(hf, "hidden_size"),
        ffn_hidden_size=require(hf, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        normalization="RMSNorm",
        layernorm_epsilon=require(hf, "rms_norm_eps"),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=hf.get("attention_dropout", 0.0),
        init_method_std=section.init_std,
        **family,
        **plain_modules(section),
    )


def _dense_mlp(_: int, ours: str, theirs: str) -> Iterator[Rule]:
    return gated_mlp(f"{ours}.mlp", f"{theirs}.mlp")


def dense_rules(
    hf: HFConfig, qkv_bias: bool = False, qk_norm: bool = False, mlp: MlpRules = _dense_mlp
) -> Iterator[Rule]:
    """Every tensor, with the names that transformers gives them."""
    tied = hf.get("tie_word_embeddings", False)
    head = "lm_head.weight"
    yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), redundant=(head,) if tied else ())
    for layer in range(hf["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield Rule(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",))
        yield from _attention(hf, f"{ours}.self_attention", f"{theirs}.self_attn", qkv_bias, qk_norm)
        yield Rule(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        yield from mlp(layer, ours, theirs)
    yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not tied:
        yield Rule("output_layer.weight", (head,))


def _attention(hf: HFConfig, ours: str, theirs: str, qkv_bias: bool, qk_norm: bool) -> Iterator[Rule]:
    groups = key_value_heads(hf)
    shares = (hf["num_attention_heads"] // groups, 1, 1)
    for kind in ("weight", "bias") if qkv_bias else ("weight",):
        names = tuple(f"{theirs}.{part}_proj.{kind}" for part in "qkv")
        yield Rule(f"{ours}.linear_qkv.{kind}", names, groups=groups, shares=shares)
    if qk_norm:
        for part in "qk":
            yield Rule(f"{ours}.{part}_layernorm.weight", (f"{theirs}.{part}_norm.weight",))
    yield Rule(f"{ours}.linear_proj.weight", (f"{theirs}.o_proj.weight",))


def key_value_heads(hf: HFConfig) -> int:
    """Query groups; a config without the key has as many as heads."""
    heads: int = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    return heads


def full_attention_only(hf: HFConfig) -> None:
    """Refuse windows.

    Raises:
        DataError: some layer sees only a window of the text.
    """
    refuse_other(hf, use_sliding_window=False)
    for layer, kind in enumerate(hf.get("layer_types") or ()):
        if kind != "full_attention":
            raise DataError(f"config.json: layer_types[{layer}] = {kind!r} is not supported, only 'full_attention'")
