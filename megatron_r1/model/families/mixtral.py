"""Mixtral (arXiv 2401.04088): Llama's shape with eight experts in every layer, two for each token."""

from collections.abc import Iterator

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.dense import dense_config, dense_rules
from megatron_r1.model.families.experts import expert_rules, experts_config, softmax_router
from megatron_r1.model.family import HFConfig, Rule, refuse_other, require

GATE_UP_DOWN = ("w1", "w3", "w2")


class Mixtral:
    """`MixtralForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config: the whole text is attended to, and the chosen experts' weights add up to 1."""
        refuse_other(hf, sliding_window=None, router_jitter_noise=0.0)
        require({**hf, **(hf.get("rope_parameters") or {})}, "rope_theta")  # not 10000 where it is missing
        top_k = require(hf, "num_experts_per_tok")
        experts = experts_config(
            section,
            count=require(hf, "num_local_experts"),
            top_k=top_k,
            width=require(hf, "intermediate_size"),
            sparse=[True] * require(hf, "num_hidden_layers"),
        )
        return dense_config(hf, section, **experts, **softmax_router(top_k, normalised=True))

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Tensor names as in the released checkpoints."""

        def mlp(_: int, ours: str, theirs: str) -> Iterator[Rule]:
            return expert_rules(f"{ours}.mlp", f"{theirs}.block_sparse_moe", hf["num_local_experts"], GATE_UP_DOWN)

        return dense_rules(hf, mlp=mlp)
