"""Mistral: Llama's shape, from which only the switches differ."""

from collections.abc import Iterator
from typing import Any

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.dense import dense_config, dense_rules
from megatron_r1.model.family import HFConfig, Rule, refuse_other


class Mistral:
    """`MistralForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> Any:
        refuse_other(hf, sliding_window=None)
        return dense_config(hf, section)

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        return dense_rules(hf)
