"""DeepSeek-V3, R1 and Moonlight: multi-latent attention, sigmoid-routed experts, multi-token prediction.

Architecture: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 2. Moonlight (arXiv 2502.16982) leaves out the
compression of queries, groups of experts, and multi-token prediction.
"""

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_r1.config.schedule import largest, value_at
from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError
from megatron_r1.model.families.deepseek import deepseek_config, layer_rules
from megatron_r1.model.family import HFConfig, Rule, require


class DeepseekV3:
    """`DeepseekV3ForCausalLM`."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> MLATransformerConfig:
        """Megatron's config of a DeepSeek-V3 shaped model.

        Raises:
            DataError: a key is missing, or has a value that Megatron's modules do not implement.
        """
        mtp_layers = hf.get("num_nextn_predict_layers", 0) if largest(section.mtp_loss_coef) else 0
        mtp = {"mtp_num_layers": mtp_layers or None, "mtp_loss_scaling_factor": value_at(section.mtp_loss_coef, 0)}
        return deepseek_config(hf, section, **_router(hf, section), **mtp)

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Tensor names as in the released checkpoint (DeepSeek-V3 README_WEIGHTS)."""
        layers = hf["num_hidden_layers"]
        mtp = range(hf.get("num_nextn_predict_layers", 0))
        embedding_copies = tuple(f"model.layers.{layers + depth}.embed_tokens.weight" for depth in mtp)
        head_copies = tuple(f"model.layers.{layers + depth}.shared_head.head.weight" for depth in mtp)
        yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), embedding_copies)
        for layer in range(layers):
            yield from layer_rules(hf, f"decoder.layers.{layer}", layer, selection_bias=True)
        yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",))
        yield Rule("output_layer.weight", ("lm_head.weight",), head_copies)
        for depth in mtp:
            ours, theirs = f"mtp.layers.{depth}", f"model.layers.{layers + depth}"
            # eh_proj takes [embedding; hidden] in the checkpoint as in Megatron: no columns to exchange.
            for name in ("enorm", "hnorm", "eh_proj"):
                yield Rule(f"{ours}.{name}.weight", (f"{theirs}.{name}.weight",))
            yield from layer_rules(hf, f"{ours}.transformer_layer", layers + depth, selection_bias=True)
            yield Rule(f"{ours}.final_layernorm.weight", (f"{theirs}.shared_head.norm.weight",))


def _router(hf: HFConfig, section: ModelSection) -> dict[str, Any]:
    """Node-limited routing with auxiliary-loss-free balancing (DeepSeek-V3 2.1.2)."""
    # The first two must be there: without them vLLM takes softmax scores and no selection bias.
    require(hf, "scoring_func", "sigmoid")
    require(hf, "topk_method", "noaux_tc")
    require(hf, "norm_topk_prob", True)
    groups, chosen_groups, top_k = (require(hf, key) for key in ("n_group", "topk_group", "num_experts_per_tok"))
    if chosen_groups < groups and top_k != 2 * chosen_groups:
        # Megatron ranks groups by their best top_k / topk_group experts (the paper's K_r / M), the published
        # inference code and transformers by their best 2: the same only here.
        raise DataError(
            f"config.json: num_experts_per_tok {top_k} must be 2 x topk_group {chosen_groups} when only some of the "
            f"{groups} groups are chosen: otherwise trainer and engine route differently"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": value_at(section.bias_update_rate, 0),
        "moe_router_num_groups": groups if chosen_groups < groups else None,
        "moe_router_group_topk": chosen_groups if chosen_groups < groups else None,
    }
