"""Qwen3's dense models (arXiv 2505.09388): Llama's shape with a norm on the queries and keys of each head."""

from collections.abc import Iterator

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.dense import dense_config, dense_rules, full_attention_only
from megatron_r1.model.family import HFConfig, Rule, refuse_other, require


class Qwen3:
    """`Qwen3ForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config."""
        full_attention_only(hf)
        require(hf, "head_dim")  # not hidden_size / num_attention_heads where it is missing
        refuse_other(hf, attention_bias=False)
        return dense_config(hf, section, qk_layernorm=True)

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Every tensor of the model."""
        return dense_rules(hf, qk_norm=True)
