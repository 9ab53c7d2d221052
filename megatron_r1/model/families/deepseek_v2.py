"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): multi-latent attention, softmax-routed experts."""

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError
from megatron_r1.model.families.deepseek import deepseek_config, layer_rules
from megatron_r1.model.families.experts import softmax_router
from megatron_r1.model.family import HFConfig, Rule, refuse_other, require


class DeepseekV2:
    """`DeepseekV2ForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> MLATransformerConfig:
        """Megatron's config: the chosen experts' weights are scaled, not normalised.

        Raises:
            DataError: a key is missing, or has a value that Megatron's modules do not implement.
        """
        refuse_other(hf, scoring_func="softmax", norm_topk_prob=False)
        router = softmax_router(require(hf, "num_experts_per_tok"), normalised=False)
        return deepseek_config(hf, section, **router, **_groups(hf))

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Tensor names as in the released checkpoints."""
        yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
        for layer in range(hf["num_hidden_layers"]):
            yield from layer_rules(hf, f"decoder.layers.{layer}", layer, selection_bias=False)
        yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",))
        yield Rule("output_layer.weight", ("lm_head.weight",))


def _groups(hf: HFConfig) -> dict[str, Any]:
    """Device-limited routing (DeepSeek-V2 2.2.2): only the `topk_group` groups with the best single expert are open.

    Raises:
        DataError: Megatron, or vLLM, would choose other groups than the released model.
    """
    groups, chosen, top_k = hf.get("n_group") or 1, hf.get("topk_group") or 1, hf["num_experts_per_tok"]
    method = require({"topk_method": "greedy", **hf}, "topk_method", "greedy", "group_limited_greedy")
    if chosen >= groups:
        return {}
    if method == "greedy":
        raise DataError(
            f"config.json: topk_method 'greedy' chooses among all experts, but topk_group {chosen} of n_group {groups} "
            "has vLLM choose among some: trainer and engine would route differently"
        )
    if top_k // chosen != 1:
        # Megatron ranks groups by the sum of their best top_k // topk_group experts.
        raise DataError(
            f"config.json: num_experts_per_tok {top_k} with topk_group {chosen} is not supported: Megatron would rank "
            f"groups of experts by their best {top_k // chosen}, the model ranks them by their best one"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
