"""What megatron-core 0.16 and 0.19 write differently: layer specs, and the name of a part of the MTP layer."""

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


def mtp_means(tracker: dict[str, Any]) -> Any:
    """The mean MTP loss of each layer that Megatron has kept, under 0.16's name or 0.19's; None = of none. [layers]"""
    return tracker.get("values", tracker.get("loss_values"))
