"""Layers of routed experts, as Megatron's config and as rules: what every mixture-of-experts family shares.

Each token goes to the `top_k` experts with the highest scores, none is dropped (Switch Transformer's routing,
arXiv 2101.03961, in the form of arXiv 2401.04088 and 2401.06066).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError
from megatron_r1.model.family import GATE_UP_DOWN, Rule, gated_mlp


def experts_config(
    section: ModelSection, *, count: int, top_k: int, width: int, sparse: Sequence[bool]
) -> dict[str, Any]:
    """The part of a `TransformerConfig` that does not depend on how experts are scored.

    Args:
        section: the run's [model]; the sequence-wise balance loss is on where it gives it a weight.
        count: experts a layer.
        top_k: experts a token.
        width: hidden size of one expert.
        sparse: for each layer, whether it has experts; a dense MLP if not.

    Raises:
        DataError: fewer experts than a token needs.
    """
    if not 1 <= top_k <= count:
        raise DataError(f"config.json: num_experts_per_tok = {top_k}, but a layer has {count} experts")
    return {
        "num_moe_experts": count,
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": width,
        "moe_layer_freq": [int(layer) for layer in sparse],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if section.balance_loss_coef else "none",
        "moe_aux_loss_coeff": section.balance_loss_coef,
    }


def softmax_router(top_k: int, *, normalised: bool) -> dict[str, Any]:
    """Softmax scores; `normalised` = the chosen experts' weights add up to 1.

    Normalising after the softmax is the same as a softmax over the chosen experts alone, which is what Megatron does
    unless it is told to take the softmax first.

    Raises:
        DataError: one expert a token with the constant weight 1: its router gets no gradient.
    """
    if normalised and top_k == 1:
        raise DataError("config.json: num_experts_per_tok = 1 with normalised weights leaves a router without gradient")
    return {"moe_router_score_function": "softmax", "moe_router_pre_softmax": not normalised}


def expert_rules(ours: str, theirs: str, count: int, names: tuple[str, str, str] = GATE_UP_DOWN) -> Iterator[Rule]:
    """A layer's router and experts; `ours` and `theirs` are the prefixes of the layer's mixture."""
    yield Rule(f"{ours}.router.weight", (f"{theirs}.gate.weight",))
    for expert in range(count):
        yield from gated_mlp(f"{ours}.experts.local_experts.{expert}", f"{theirs}.experts.{expert}", names)
