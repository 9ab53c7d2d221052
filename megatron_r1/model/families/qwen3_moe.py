"""Qwen3's mixtures of experts (arXiv 2505.09388): Qwen3's attention, softmax-routed experts, none shared."""

from collections.abc import Iterator

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.model.families.dense import dense_config, dense_rules, full_attention_only
from megatron_r1.model.families.experts import expert_rules, experts_config, softmax_router
from megatron_r1.model.family import HFConfig, Rule, gated_mlp, refuse_other, require


class Qwen3Moe:
    """`Qwen3MoeForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config."""
        full_attention_only(hf)
        require(hf, "head_dim")  # not hidden_size / num_attention_heads where it is missing
        refuse_other(hf, attention_bias=False, shared_expert_intermediate_size=0)
        layers, top_k = require(hf, "num_hidden_layers"), require(hf, "num_experts_per_tok")
        experts = experts_config(
            section,
            count=_experts(hf),
            top_k=top_k,
            width=require(hf, "moe_intermediate_size"),
            sparse=[_is_sparse(hf, layer) for layer in range(layers)],
        )
        router = softmax_router(top_k, normalised=require(hf, "norm_topk_prob", True, False))
        return dense_config(hf, section, qk_layernorm=True, **experts, **router)

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Every tensor of the model."""

        def mlp(layer: int, ours: str, theirs: str) -> Iterator[Rule]:
            if _is_sparse(hf, layer):
                return expert_rules(f"{ours}.mlp", f"{theirs}.mlp", _experts(hf))
            return gated_mlp(f"{ours}.mlp", f"{theirs}.mlp")

        return dense_rules(hf, qk_norm=True, mlp=mlp)


def _experts(hf: HFConfig) -> int:
    """Released checkpoints call the number of experts `num_experts`, transformers 5 writes `num_local_experts`."""
    count: int = hf["num_local_experts"] if "num_local_experts" in hf else require(hf, "num_experts")
    return count


def _is_sparse(hf: HFConfig, layer: int) -> bool:
    """Whether a layer has experts: every `decoder_sparse_step`-th has, unless it is one of `mlp_only_layers`."""
    listed = layer in (hf.get("mlp_only_layers") or ())
    return not listed and (layer + 1) % (hf.get("decoder_sparse_step") or 1) == 0
