"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama's shape with a bias on queries, keys and values."""

from collections.abc import Iterator

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.dense import dense_config, dense_rules, full_attention_only
from megatron_r1.model.family import HFConfig, Rule


class Qwen2:
    """`Qwen2ForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config; the bias is there whatever config.json says."""
        full_attention_only(hf)
        return dense_config(hf, section, add_qkv_bias=True)

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Every tensor of the model."""
        return dense_rules(hf, qkv_bias=True)
