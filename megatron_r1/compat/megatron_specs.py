"""What megatron-core 0.16 and 0.19 write differently: layer specs, names and numbers of the MTP layer."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any


def submodules(spec: Any) -> Any:
    """What a spec builds its module from; None = nothing. 0.16 has `ModuleSpec` where 0.19 has `functools.partial`."""
    return spec.keywords.get("submodules") if isinstance(spec, partial) else getattr(spec, "submodules", None)


def rebuilt(spec: "partial[Any]", change: Callable[[Any], Any]) -> "partial[Any]":
    """The same, with every part changed."""
    return partial(change(spec.func), *spec.args, **{name: change(value) for name, value in spec.keywords.items()})


def recomputes_packed(mtp_layer: type[Any]) -> bool:
    """Whether Megatron's MTP layer can be computed again where sequences are packed, as from 0.19 on.

    Args:
        mtp_layer: its class.
    """
    return "packed_seq_params" in inspect.signature(mtp_layer._checkpointed_forward).parameters


def name_in_rules(name: str) -> str:
    """A tensor's name in 0.19's modules as in 0.16's, by which rules know it."""
    return name.replace(".mtp_model_layer.", ".transformer_layer.")


def layer_of(router: Any) -> int:
    """Number of a router's layer, from 1, MTP layers behind the trunk's as in 0.16: 0.19 counts these from 1 again."""
    behind = router.config.num_layers if getattr(router, "is_mtp_layer", False) else 0
    return int(router.layer_number + behind)


def mtp_means(tracker: dict[str, Any]) -> Any:
    """The mean MTP loss of each layer that Megatron has kept, under 0.16's name or 0.19's; None = of none. [layers]"""
    return tracker.get("values", tracker.get("loss_values"))
