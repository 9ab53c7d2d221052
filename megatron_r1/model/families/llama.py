"""Llama 2 and 3 (arXiv 2407.21783), and models of their shape such as SmolLM2."""

from collections.abc import Iterator

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.dense import dense_config, dense_rules
from megatron_r1.model.family import HFConfig, Rule, refuse_other


class Llama:
    """`LlamaForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config: no bias anywhere."""
        refuse_other(hf, attention_bias=False, mlp_bias=False)
        return dense_config(hf, section)

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Every tensor of the model."""
        return dense_rules(hf)
